"""Per-sample Jacobians of a model, in factored form, and their contraction."""
