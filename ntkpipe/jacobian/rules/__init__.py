"""Which torch functions have a structured Jacobian: one small function for each, in the file of its family.

``form`` has the three ways in which a parameter can enter an output, ``table`` maps torch functions to rules. To add an
operation, write a function with the arguments of the torch function that returns a :class:`~ntkpipe.jacobian.rules.form.Bound`:
which of its arguments may be parameters, and the form in which each enters. Return None for options that no form covers.
Then list it in the ``RULES`` of its file. A rule that is wrong cannot do harm: on probe batches its uses must add up to
the gradient, and the self-check compares every parameter with plain ``torch.func``.
"""
