"""The certificate: the whole stored kernel against the model with one number, K v against J(J'v).

A random sign vector v is multiplied by the stored matrix, tile by tile, and by J J' without any Gram matrix: one
vector-Jacobian and one Jacobian-vector product over the data, by plain ``torch.func``. Every entry of K takes part, so
a single wrong one shows in its row.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntkpipe.datasets import Source
from ntkpipe.errors import ModelError, NtkpipeError
from ntkpipe.jacobian.fallback import batch_size
from ntkpipe.kernel import Kernel, KernelStore
from ntkpipe.models import Batch, FunctionalModel

# Largest row error of a good store by the coarsest dtype on its way, on the scale sqrt(K_ii * trace K).
_TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 5e-2}
# A row is suspect if its error is this many times the median one; rounding alone stays below 8 for a million rows.
_OUTLIER = 16.0
_SHOWN = 50


@dataclass(frozen=True)
class Certificate:
    """How well a stored kernel agrees with J(J'v).

    Attributes
    ----------
    array
        The kernel.
    error
        Largest row error ``|K v - J(J'v)|_i / sqrt(K_ii * sum_j K_jj)``.
    median_error
        Median of the row errors.
    tolerance
        What a good kernel of this dtype stays below.
    suspect_rows
        Rows whose error stands out, the largest first; at most 50.
    num_suspects
        How many there are.
    """

    array: str
    error: float
    median_error: float
    tolerance: float
    suspect_rows: tuple[int, ...]
    num_suspects: int

    @property
    def is_good(self) -> bool:
        """Whether the error is small and no row stands out."""
        return self.num_suspects == 0 and self.error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "is_good": self.is_good}


@dataclass(frozen=True)
class JacobianProducts:
    """Products with J and J' over a set of samples, a batch at a time; memory is one batch and two parameter vectors.

    They run in the compute dtype and in the batches of the run, so that an activation that rounds across a kink does
    so here, too; sums over batches are float64.

    Attributes
    ----------
    model
        Selected parameters require a gradient.
    covectors
        Shape (S, O).
    batch
        Samples of one pass.
    strip
        Batches begin anew at each multiple of ``strip`` within a tile.
    tile
        Samples of a tile.
    is_mapping
        Whether a sample is a dict.
    """

    model: FunctionalModel
    covectors: Tensor
    batch: int
    strip: int
    tile: int
    is_mapping: bool

    def transposed(self, source: Source, vector: NDArray[np.float64], step: Callable[[], None]) -> dict[str, Tensor]:
        """``J' v`` as one float64 tensor a parameter; v has shape (n*S,)."""
        parameters = self.model.parameters()
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        weights = torch.from_numpy(vector).reshape(-1, len(self.covectors)).to(self.covectors) @ self.covectors
        for start, stop, batch in self._batches(source):
            outputs = self.model(batch)
            seed = torch.zeros_like(outputs)
            seed[: stop - start] = weights[start:stop]
            grads = torch.autograd.grad(outputs, list(parameters.values()), seed, allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad
            step()
        return total

    def product(self, source: Source, direction: Mapping[str, Tensor], step: Callable[[], None]) -> NDArray[np.float64]:
        """``J u`` for a direction u in parameter space, shape (n*S,)."""
        parameters = {name: value.detach() for name, value in self.model.parameters().items()}
        norm = float(torch.sqrt(sum((value**2).sum() for value in direction.values())))  # type: ignore[arg-type]
        tangents = {name: (direction[name] / (norm or 1.0)).to(value) for name, value in parameters.items()}
        parts = []
        for start, stop, batch in self._batches(source):
            slopes = self._slopes(parameters, tangents, batch).double() * norm
            parts.append((slopes @ self.covectors.double().T)[: stop - start].reshape(-1).cpu())
            step()
        return torch.cat(parts).numpy()

    def _slopes(self, parameters: dict[str, Tensor], tangents: dict[str, Tensor], batch: Batch) -> Tensor:
        if not self.model.is_replaceable(batch):
            return self._slopes_by_reverse(tangents, batch)
        try:
            products = torch.func.jvp(lambda values: self.model.call_with(values, batch), (parameters,), (tangents,))
        except NtkpipeError:
            raise
        except (RuntimeError, NotImplementedError):
            # Operations without forward-mode derivatives: J u is the derivative of (J'w)u by w.
            return self._slopes_by_reverse(tangents, batch)
        slopes: Tensor = products[1]
        return slopes

    def _slopes_by_reverse(self, tangents: dict[str, Tensor], batch: Batch) -> Tensor:
        live = self.model.parameters()
        outputs = self.model(batch)
        weights = torch.zeros_like(outputs, requires_grad=True)
        try:
            grads = torch.autograd.grad(outputs, list(live.values()), weights, create_graph=True, allow_unused=True)
            pairs = zip(live, grads, strict=True)
            dot = torch.stack([(grad * tangents[name]).sum() for name, grad in pairs if grad is not None]).sum()
            (slopes,) = torch.autograd.grad(dot, weights)
        except RuntimeError as error:
            raise ModelError(
                f"this model cannot be certified: it has neither forward-mode nor second derivatives ({error})"
            ) from error
        return slopes

    def _batches(self, source: Source) -> Any:
        for tile_start in range(0, source.num_samples, self.tile):
            tile_stop = min(tile_start + self.tile, source.num_samples)
            for strip_start in range(tile_start, tile_stop, self.strip):
                strip_stop = min(strip_start + self.strip, tile_stop)
                for start in range(strip_start, strip_stop, self.batch):
                    stop = min(start + self.batch, strip_stop)
                    arrays = {name: torch.tensor(values) for name, values in source.read(start, stop).items()}
                    if stop - start == 1:  # as the engine does: never a batch of one
                        arrays = {name: torch.cat([values, values]) for name, values in arrays.items()}
                    batch = self.model.to_batch(arrays, self.is_mapping)
                    assert batch_size(batch) >= 2
                    yield start, stop, batch

    def num_steps(self, source: Source) -> int:
        """Batches of one pass."""
        return sum(
            -(-(min(strip + self.strip, tile + self.tile, source.num_samples) - strip) // self.batch)
            for tile in range(0, source.num_samples, self.tile)
            for strip in range(tile, min(tile + self.tile, source.num_samples), self.strip)
        )


def certify(
    store: KernelStore,
    products: JacobianProducts,
    sources: Mapping[str, Source],
    *,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> tuple[Certificate, ...]:
    """Certify every kernel of a complete store.

    Parameters
    ----------
    store
        The store, its tiles already verified.
    products
        Of the model that the store was made with.
    sources
        Its samples by split.
    seed
        Of the sign vector.
    step
        Called after each batch of each pass.
    """
    manifest = store.manifest
    on_the_way = (manifest.compute_dtype, manifest.accumulate_dtype, manifest.store_dtype)
    coarsest = max(on_the_way, key=lambda dtype: _TOLERANCE[dtype])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=store.train.shape[1])
    direction = products.transposed(sources["train"], signs, step)
    diagonal = store.train.diagonal().astype(np.float64)
    exact = products.product(sources["train"], direction, step)
    found = [_judge("kernel/train", store.train, signs, exact, diagonal, diagonal.sum(), coarsest)]
    if manifest.test is not None:
        exact = products.product(sources["test"], direction, step)
        rows = np.diagonal(store.test_diagonal, axis1=1, axis2=2).reshape(-1).astype(np.float64)
        kernel = store.test_train
        found.append(_judge("kernel/test_train", kernel, signs, exact, rows, diagonal.sum(), coarsest))
    return tuple(found)


def num_steps(products: JacobianProducts, sources: Mapping[str, Source]) -> int:
    """How often :func:`certify` calls ``step``."""
    return products.num_steps(sources["train"]) + sum(products.num_steps(source) for source in sources.values())


def _judge(
    name: str,
    kernel: Kernel,
    signs: NDArray[np.float64],
    exact: NDArray[np.float64],
    diagonal: NDArray[np.float64],
    trace: float,
    dtype: str,
) -> Certificate:
    gap = np.abs(_multiply(kernel, signs) - exact)
    scale = np.sqrt(np.clip(diagonal, 0, None) * trace)
    errors = np.divide(gap, scale, out=np.where(gap > 0, np.inf, 0.0), where=scale > 0)
    median = float(np.median(errors))
    floor = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    suspect = np.flatnonzero(errors > _OUTLIER * max(median, floor / 4))
    ranked = suspect[np.argsort(-errors[suspect])]
    return Certificate(
        array=name,
        error=float(errors.max()),
        median_error=median,
        tolerance=_TOLERANCE[dtype],
        suspect_rows=tuple(int(row) for row in ranked[:_SHOWN]),
        num_suspects=len(suspect),
    )


def _multiply(kernel: Kernel, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """``K v`` in float64, each stored tile read once."""
    grid = kernel.grid
    result = np.zeros(kernel.shape[0])
    for row, column in grid.tiles():
        tile = kernel.read_tile(row, column).astype(np.float64)
        rows, columns = grid.rows.rows(row), grid.columns.rows(column)
        result[rows.start : rows.stop] += tile @ vector[columns.start : columns.stop]
        if grid.symmetric and row != column:
            result[columns.start : columns.stop] += tile.T @ vector[rows.start : rows.stop]
    return result
