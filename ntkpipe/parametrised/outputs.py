"""What is done with the outputs of a model: antisymmetric start, and scaling towards lazy or rich training."""

import copy
import math
from typing import Any

from torch import Tensor, nn

from ntkpipe.base.config import check_number


class Antisymmetric(nn.Module):
    """``(g(x; θ) − g(x; θ')) / √2`` of two copies of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first, self.second = copy.deepcopy(model), copy.deepcopy(model)
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs of a batch."""
        difference: Tensor = self.first(*args, **kwargs) - self.second(*args, **kwargs)
        return difference * math.sqrt(0.5)


class Scaled(nn.Module):
    """``α (f(x; θ) − f(x; θ_0))`` of a model and a frozen copy of it."""

    def __init__(self, model: nn.Module, alpha: float) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.model = copy.deepcopy(model)
        self.start = copy.deepcopy(model).requires_grad_(False)
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs of a batch."""
        moved: Tensor = self.model(*args, **kwargs) - self.start(*args, **kwargs)
        return self.alpha * moved


def antisymmetric(model: nn.Module) -> Antisymmetric:
    """Make ``f = (g_θ − g_θ')/√2`` with θ' = θ at the start: f₀ = 0 exactly, and the same kernel.

    Both copies are trained. The kernel at the start is that of g, (Θ + Θ)/2, so its limit is the same (Chizat, Oyallon,
    Bach 2019, arXiv 1812.07956). The model itself is left as it is.

    Memory: twice the parameters of the model, and passes twice as long.

    Parameters
    ----------
    model
        The model g, whose output is one tensor, and the same for the same inputs (no dropout).

    Returns
    -------
    A module with parameters ``first.…`` and ``second.…``, in the mode of the model.
    """
    return Antisymmetric(model)


def scaled(model: nn.Module, alpha: float) -> Scaled:
    """Make ``α (f − f₀)``, whose kernel is α² Θ: lazy for large α, rich for small ones.

    To be trained with the loss over α², or the rate over α² (Chizat, Oyallon, Bach 2019, arXiv 1812.07956, Eq. 3). The
    model itself is left as it is.

    Memory: twice the parameters of the model, half of which are frozen, and passes twice as long.

    Parameters
    ----------
    model
        The model f, whose output is one tensor, and the same for the same inputs (no dropout).
    alpha
        α > 0.

    Returns
    -------
    A module with parameters ``model.…`` that are trained and ``start.…`` that are not, in the mode of the model.

    Raises
    ------
    ConfigError
        If alpha is not a positive finite number.
    """
    return Scaled(model, check_number("alpha", alpha, low=2.0**-100, high=2.0**100))
