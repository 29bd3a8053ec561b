"""Several steps on a device without the host."""
