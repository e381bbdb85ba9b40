"""Eigenpairs, densities and functions of a matrix from its products."""
