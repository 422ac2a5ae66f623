"""What was said and what it is worth: the trace store, labels, and the selection of training trajectories."""
