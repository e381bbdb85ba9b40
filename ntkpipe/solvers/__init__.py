"""What is done with an operator: eigenpairs, linear systems, factors, functions of a matrix."""
