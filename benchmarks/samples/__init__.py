"""Samples that several benchmarks plan for."""
