"""The suites; each module has `run(settings, emit)`."""
