"""Tasks: what earns the reward. One file a task."""
