"""Measurements against peers and against a counted floor: `python -m benchmarks.run --help`."""
