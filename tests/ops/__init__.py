"""Tests of the torch custom ops against the float64 references."""
