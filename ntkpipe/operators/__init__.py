"""Matrices that answer products: dense, streamed from a store, held by the workers of a cluster."""
