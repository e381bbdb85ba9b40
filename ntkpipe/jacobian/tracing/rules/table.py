"""Torch functions and their rules."""

from collections.abc import Callable
from typing import Any

from ntkpipe.jacobian.tracing.rules import convolution, elementwise, linear, lookup, normalization
from ntkpipe.jacobian.tracing.rules.form import Rule

RULES: dict[Callable[..., Any], Rule] = {
    **linear.RULES,
    **convolution.RULES,
    **lookup.RULES,
    **normalization.RULES,
    **elementwise.RULES,
}
