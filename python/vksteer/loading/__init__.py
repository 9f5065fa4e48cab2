"""From files as people have them to a Config, named tensors and a tokenizer."""
