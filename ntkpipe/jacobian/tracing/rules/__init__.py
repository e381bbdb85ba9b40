"""Which torch functions have a structured Jacobian: a small function for each, in the file of its family."""
