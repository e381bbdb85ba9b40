"""Which torch functions have a structured Jacobian: one small function for each, in the file of its family.

``form`` has the three ways in which a parameter can enter an output, ``table`` maps torch functions to rules. To add an
operation, write a function with the arguments of the torch function that returns a ``form.Bound``: which arguments may
be parameters, and the form in which each enters the output. Return None for options that no form covers. Then list the
torch function, and its other names, in ``RULES`` of the same file, and a case in ``tests/jacobian/test_rules.py``.

A rule that is wrong cannot do harm: on probe batches the uses of a parameter must add up to its gradient, and the
self-check compares every parameter with plain ``torch.func``.
"""
