"""Dual activations: E[σ(u)σ(v)] and E[σ'(u)σ'(v)] of Gaussian pairs, in closed form, by series, by quadrature."""
