"""Gaussian processes with a stored kernel as covariance."""
