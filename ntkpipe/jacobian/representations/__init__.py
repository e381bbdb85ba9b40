"""How the Jacobian of a parameter is held and contracted."""
