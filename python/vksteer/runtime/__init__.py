"""A device, a model on it, and its passes: run, generate, gradients."""
