"""Fits parameters to examples: configuration, state, step, checkpoints and the loop."""
