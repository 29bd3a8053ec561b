"""The version, the only place that says it: setup.py and CMake read this line."""

__version__ = "0.1.0"
