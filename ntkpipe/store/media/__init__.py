"""Where the bytes of a store are: a folder or an object store."""
