"""Learning with a stored kernel."""
