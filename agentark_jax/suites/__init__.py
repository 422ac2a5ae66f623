"""What can be measured of one model, each suite a module of its own: `registry.SUITES`."""
