"""What a run found, for people: the HTML page and its plots, the terminal summary and the model card."""
