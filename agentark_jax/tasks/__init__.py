"""What is asked and what counts as right: question sources and rule graders."""
