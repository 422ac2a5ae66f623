"""What a model can do, and how sure we are of it."""
