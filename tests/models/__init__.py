"""Loaders, tokenizers and the model definition."""
