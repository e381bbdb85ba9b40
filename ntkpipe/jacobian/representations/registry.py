"""Every representation of Jacobians, and which of them is chosen."""

from collections.abc import Sequence

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Representation, Setup
from ntkpipe.jacobian.representations.joined import Joined
from ntkpipe.jacobian.representations.late import Late
from ntkpipe.jacobian.representations.pairwise import Pairwise
from ntkpipe.jacobian.representations.table import LookupTable
from ntkpipe.jacobian.tracing.uses import Use

# The first that suits is chosen; the last suits everything.
CHOICES: tuple[type[Representation], ...] = (Pairwise, Late, LookupTable, Dense)
REPRESENTATIONS: tuple[type[Representation], ...] = (*CHOICES, Joined)


def choose_representation(uses: Sequence[Use], setup: Setup) -> type[Representation]:
    """The cheapest exact way to hold the Jacobians of a term's uses."""
    return next(each for each in CHOICES if each.suits(uses, setup))


def recorded_representation(word: str) -> type[Representation]:
    """The choice that a manifest records by its word; ``dense`` for any other word."""
    return next((each for each in CHOICES if each.word == word), Dense)
