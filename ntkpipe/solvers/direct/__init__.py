"""Factorisations: Cholesky in memory or on disk, LAPACK eigenvalues."""
