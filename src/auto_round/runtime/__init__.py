"""The machine: devices and what they are good at, memory, events of a run."""
