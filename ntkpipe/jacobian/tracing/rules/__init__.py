"""Which torch functions have a structured Jacobian: one small function for each, in the module of its family.

``form`` defines the three ways in which a parameter can enter an output, ``table`` maps torch functions to rules. To
add an operation, write a function with the arguments of the torch function that returns a ``form.Bound``: which
arguments may be parameters, and the form in which each enters the output. Return None for options that no form covers.
Then list the torch function, and its other names, in ``RULES`` of that module, and add a case to the module's tests in
``tests/jacobian/tracing/rules``.

A wrong rule can do no harm: on probe batches the uses of a parameter must add up to its gradient, and the self-check
compares every parameter with plain ``torch.func``.
"""
