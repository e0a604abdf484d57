"""The source experiment: data, fine-tuning and evaluation of several methods from the same seed."""
