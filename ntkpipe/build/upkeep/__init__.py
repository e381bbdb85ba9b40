"""Verify, repair and grow a store that a model computed."""
