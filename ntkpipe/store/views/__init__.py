"""A stored kernel in the types of other libraries."""
