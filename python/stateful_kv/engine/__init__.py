"""The step loop and who runs it."""
