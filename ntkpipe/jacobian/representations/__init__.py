"""How the Jacobians of a parameter are held and contracted: a file for each representation, ``joined`` in ``dense``.

A new one is a file with a subclass of :class:`~ntkpipe.jacobian.representations.interface.Representation`, which says
when it pays, what it holds, how it is filled and contracted, what that costs, and what the parameter report calls it;
and an entry in ``terms.CHOICES``, where the first that suits is chosen.
"""
