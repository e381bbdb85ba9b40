"""Changing a store that exists: growth and repair, except for computing."""
