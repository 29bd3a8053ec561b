"""Slow and obvious models of what the library computes.

Numerical references work in float64 on numpy arrays and import nothing from stateful_kv, so an
error in the library cannot hide in its own yardstick.
"""
