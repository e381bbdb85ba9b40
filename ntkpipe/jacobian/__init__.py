"""Per-sample Jacobians of a model, kept factored, and their contraction.

``rules`` says which torch functions have a factored Jacobian, ``trace`` finds where a model uses its parameters,
``fallback`` is plain ``torch.func`` for everything else, ``factors`` holds and contracts what they find, ``block`` puts
them together for a run of samples, and ``check`` compares the result with an independent reference.
"""
