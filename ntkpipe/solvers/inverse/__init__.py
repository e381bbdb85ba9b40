"""The inverse ``(K + λI)^-1``: one contract, kept by all eigenpairs, by factors, and by passes."""
