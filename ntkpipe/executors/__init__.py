"""Where tiles are computed: threads of this process or a Dask cluster."""
