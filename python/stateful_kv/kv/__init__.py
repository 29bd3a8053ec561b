"""Keys and values: pools, pages, sequences, the prefix tree."""
