"""Programs on the engine: command line, demo, reports, profiles."""
