"""Which calls of a model use a parameter, and how each enters the output."""
