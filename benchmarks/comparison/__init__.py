"""What engine.py compares: the work, and the methods that do it."""
