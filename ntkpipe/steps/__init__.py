"""Solvers and analyses on stored kernels: one table, from which commands, workflow steps, results and sections come."""
