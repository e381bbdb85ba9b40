"""What is asked of a build: a model, its samples and the specs of kernel and run, which travel down whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ntkpipe.base.config import KernelSpec, RunSpec, spec_of
from ntkpipe.base.errors import DataError
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.jacobian.model.samples import Samples, as_samples, require_same_arrays
from ntkpipe.store.manifest import Manifest


@dataclass(frozen=True)
class Request:
    """A kernel that is asked for."""

    model: nn.Module
    train: Samples
    test: Samples | None
    kernel: KernelSpec
    run: RunSpec
    forward: Forward = None

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        samples: tuple[Samples, Samples | None] | None = None,
        stored: Manifest | None = None,
    ) -> "Request":
        """The request that the arguments of a public function make, by default of the samples among them."""
        train, test = samples or _train_and_test(arguments)
        kernel, run = spec_of(KernelSpec, arguments), spec_of(RunSpec, arguments)
        if stored is not None:  # its tile was cut to the samples of the first run; another one may be asked for
            first = (*stored.earlier(), stored)[0].train.num_samples
            if kernel.tile is None or min(kernel.tile, first) == stored.tile:
                kernel = kernel.model_copy(update={"tile": stored.tile})
        return cls(arguments["model"], train, test, kernel, run, arguments["forward"])


def _train_and_test(arguments: Mapping[str, Any]) -> tuple[Samples, Samples | None]:
    train = as_samples(arguments["inputs"], arguments["targets"])
    if arguments["test_inputs"] is None:
        if arguments["test_targets"] is not None:
            raise DataError("test_targets were given without test_inputs")
        return train, None
    test = as_samples(arguments["test_inputs"], arguments["test_targets"], label="test_inputs")
    require_same_arrays(train, test, "test_inputs")
    return train, test
