"""A stored matrix held by the workers of a Dask cluster."""
