"""Models: definitions that compose ops, and loaders for the files they come in."""
