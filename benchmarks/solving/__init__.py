"""What benchmarks/solvers.py measures, a module a part, and what they share."""
