"""Per-sample Jacobians of a model, in factored form, and their contraction.

``model`` holds the network as a function and its samples. ``tracing`` finds where it uses its parameters, and the rules
there say how each use is differentiated; ``fallback`` is plain ``torch.func`` for everything else. ``representations``
holds Jacobians and contracts them. ``engine`` puts these together for a run of samples, ``probe`` sets an engine up,
and ``self_check`` compares it with an independent reference.
"""
