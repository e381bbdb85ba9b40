"""``jacobian_operator``: J J' as an operator without a stored matrix; every product goes through the data twice."""

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.arguments import checked
from ntkpipe.base.config import ComputeDtype, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.base.resources import available_memory
from ntkpipe.build.prepare import Prepared, Request, exact_single_thread, prepare, products_of
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.functional import Forward, fingerprint
from ntkpipe.jacobian.model.samples import as_samples
from ntkpipe.jacobian.representations.contract import contract_diagonal_planes
from ntkpipe.jacobian.self_check import self_check

_SHARE_OF_MEMORY = 0.5  # of the free memory, for the self-check, which has no plan
_NUM_PROBES = 32  # random sign vectors for the Frobenius norm


class JacobianOperator(Operator):
    """The kernel of a model and samples, never formed: ``K v = J (J' v)``."""

    # A product is, for each column, one vector-Jacobian and one Jacobian-vector product a batch, each with its forward
    # pass, in the compute dtype; sums over batches are float64. The diagonal is exact, by one pass of per-sample
    # Jacobians. The Frobenius norm, which :meth:`storage_floor` needs, is estimated from 32 products with random signs.

    work = Work()  # a pass is a product with any number of columns

    def __init__(
        self, prepared: Prepared, engine: Engine, *, batch: int, identity: str, step: Callable[[], None]
    ) -> None:
        kind, model = prepared.kind, prepared.model
        if kind.pairs == "same":
            raise ConfigError(
                f"kind={kind.name!r} is a matrix for each output; give 'output:k', or 'trace' for their mean"
            )
        dtype = np.dtype(np.float64 if model.dtype == torch.float64 else np.float32)
        super().__init__(prepared.train.num_samples * prepared.num_covectors, dtype)
        size = prepared.train.num_samples
        self._products = products_of(prepared, size, size, size, batch)
        # The identity holds digests of parameters and samples, and what is computed from them.
        self._prepared, self._engine, self._identity, self._step = prepared, engine, identity, step

    def identity(self) -> str:
        """See :meth:`Operator.identity`."""
        return self._identity

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        start, source = perf_counter(), self._prepared.train.source
        found = np.zeros_like(block)
        with exact_single_thread(self._prepared.spec.compute_dtype):
            for column in range(block.shape[1]):
                vector = np.ascontiguousarray(block[:, column])
                for products in self._products:
                    direction = products.transposed(source, vector, self._step)
                    found[:, column] += products.product(source, direction, self._step)
        self.work += Work(1.0, 0, perf_counter() - start)
        return found

    def _measure(self) -> Statistics:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(self.num_rows, _NUM_PROBES))
        squared = float(np.square(self.matmat(signs)).sum()) / _NUM_PROBES
        return Statistics(self._diagonal(), squared**0.5)

    def _diagonal(self) -> NDArray[np.float64]:
        start, parts = perf_counter(), []
        with exact_single_thread(self._prepared.spec.compute_dtype):
            for span, batch in self._products[0].batches(self._prepared.train.source):
                piece, _ = self._engine.piece(batch)
                (values,) = contract_diagonal_planes(piece, self._prepared.kind.pairs, 1)
                parts.append(values[: len(span)].diagonal(dim1=1, dim2=2).reshape(-1).double().cpu())
                self._step()
        self.work += Work(1.0, 0, perf_counter() - start)
        return torch.cat(parts).numpy()


@checked
def jacobian_operator(
    model: nn.Module,
    inputs: object,
    *,
    kind: str = "pntk",
    forward: "Forward" = None,
    parameters: str | Sequence[str] | None = None,
    compute_dtype: ComputeDtype = "float64",
    batch: int = 64,
    device: str | None = None,
    step: Callable[[], None] = lambda: None,
) -> JacobianOperator:
    """The kernel as an operator for solvers, without a matrix anywhere.

    This pays where few products are needed, or where no disk holds the matrix. Memory is one batch and two vectors of
    all parameters in float64. The Frobenius norm is an estimate with a standard error of at most an eighth.

    Parameters
    ----------
    kind
        Kind of kernel: ``"pntk"``, ``"trace"``, ``"output:k"`` or ``"ntk"``.
    compute_dtype
        dtype of products with the Jacobian. In float32 they are no more exact than a kernel of float32.
    batch
        Samples of one forward pass, at least 2.
    step
        Called after each batch of each product.

    Raises
    ------
    ConfigError, DataError, ModelError
        If an option is wrong, the kind has a matrix for each output, or samples or model cannot be used as they are.
    SelfCheckError
        If its Jacobians are not what plain ``torch.func`` says, or depend on the rest of the batch.
    """
    given = locals()
    check_number("batch", batch, low=2)
    samples = as_samples(inputs, with_targets=False)
    digest = samples.inspect("inputs").inputs_digest
    with exact_single_thread(compute_dtype):
        prepared = prepare(Request.of(given, (samples, None)), device=device)
        memory = int(_SHARE_OF_MEMORY * available_memory())
        engine, _ = self_check(prepared.engine, prepared.load, samples.num_samples, batch=batch, memory_bytes=memory)
    made_from = fingerprint(model, prepared.model.names)
    identity = f"J J' {kind} {compute_dtype} {made_from.state_digest} {made_from.structure_digest} {digest}"
    return JacobianOperator(prepared, engine, batch=batch, identity=identity, step=step)
