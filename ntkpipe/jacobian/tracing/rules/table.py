"""Torch functions and their rules."""

from ntkpipe.jacobian.tracing.rules import convolution, elementwise, linear

RULES = linear.RULES | convolution.RULES | linear.LOOKUPS | elementwise.NORMALIZATIONS | elementwise.RULES
