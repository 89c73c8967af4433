"""The tuner: starting codes from range search and compensated rounding, then sign-gradient steps block by block."""
