"""Torch functions and their rules."""

from ntkpipe.jacobian.tracing.rules import convolution, elementwise, linear, lookup, normalization

RULES = linear.RULES | convolution.RULES | lookup.RULES | normalization.RULES | elementwise.RULES
