"""A model's files, as they are distributed, to a Config, named tensors and a tokenizer."""
