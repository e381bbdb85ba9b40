"""How the Jacobians of a parameter are held and contracted: a file for each representation."""
