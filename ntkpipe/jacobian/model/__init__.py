"""A model and its samples as the engine takes them."""
