"""The machine: devices, memory, spans."""
