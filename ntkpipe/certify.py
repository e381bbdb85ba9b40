"""The certificate: the whole stored kernel against the model with one number, K v against J(J'v).

A random sign vector v is multiplied by the stored matrix, tile by tile, and by J J' without any Gram matrix: one
vector-Jacobian and one Jacobian-vector product over the data, by plain ``torch.func``. Every entry of K takes part, so
a single wrong one shows in its row.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.datasets import Samples, Source, StoredSource, as_samples
from ntkpipe.errors import ConfigError, StoreMismatchError
from ntkpipe.jacobian.probe import with_fast_layout
from ntkpipe.jacobian.products import JacobianProducts
from ntkpipe.kernel import Kernel, KernelStore
from ntkpipe.kinds import get_kind
from ntkpipe.manifest import DataRecord
from ntkpipe.models import DTYPES, Forward, fingerprint, prepare_model, resolve_device
from ntkpipe.prepare import loader
from ntkpipe.verification import Finding, VerificationReport

# Largest row error of a good store by the coarsest dtype on its way, on the scale sqrt(K_ii * trace K).
_TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "tf32": 1e-2, "bfloat16": 5e-2}
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
class Witness:
    """What a store is certified against: the model and the samples that it was made with.

    Attributes
    ----------
    products
        Of the model; their sum is the kernel's. One, unless pairs of unlike covectors are no part of it.
    sources
        Samples by split.
    """

    products: tuple[JacobianProducts, ...]
    sources: Mapping[str, Source]

    @property
    def num_steps(self) -> int:
        """How often :func:`certify` calls ``step``: twice over the train samples, once over the test samples."""
        passes = [self.sources["train"], *self.sources.values()]
        return sum(len(each.spans(source.num_samples)) for each in self.products for source in passes)


def find_witness(
    store: KernelStore, model: nn.Module, inputs: object, test_inputs: object, *, forward: Forward, device: str | None
) -> Witness:
    """Check that model and samples are those of the store, and make the products.

    Parameters
    ----------
    store
        The store.
    model, forward, device
        As for :func:`ntkpipe.compute_kernel`.
    inputs, test_inputs
        The samples; none takes those in the store.

    Raises
    ------
    StoreMismatchError
        If the fingerprints of model or samples differ.
    """
    manifest = store.manifest
    sources: dict[str, Source] = {"train": StoredSource(store.store, "train", manifest.train.num_samples)}
    if manifest.test is not None:
        sources["test"] = StoredSource(store.store, "test", manifest.test.num_samples)
    for split, given, record in (("train", inputs, manifest.train), ("test", test_inputs, manifest.test)):
        if given is not None:
            sources[split] = _matching_samples(store, given, record, split).source
    _require_same_model(store, model)
    functional = prepare_model(
        model,
        forward=forward,
        parameters=manifest.model.parameters,
        dtype=DTYPES[manifest.compute_dtype],
        tf32=manifest.compute_dtype == "tf32",
        device=resolve_device(device),
    )
    samples = Samples(sources["train"], manifest.train.is_mapping, None, False, "train inputs")
    functional = with_fast_layout(functional, loader(functional, samples), samples.num_samples)
    kind = get_kind(manifest.kind)
    covectors = torch.from_numpy(kind.covectors(manifest.num_outputs))
    choices = manifest.choices
    whole = JacobianProducts(
        model=functional,
        covectors=covectors.to(device=functional.device, dtype=functional.dtype),
        tile=manifest.tile,
        strip=choices.strip,
        subtile=choices.subtile,
        batch=choices.batch,
        is_mapping=manifest.train.is_mapping,
    )
    if kind.pairs == "all":
        return Witness((whole,), sources)
    return Witness(tuple(replace(whole, covectors=one[None]) for one in whole.covectors), sources)


def _require_same_model(store: KernelStore, model: nn.Module) -> None:
    stored, given = store.manifest.model, fingerprint(model, store.manifest.model.parameters)
    differing = tuple(
        (f"model.{field}", getattr(stored, field), getattr(given, field))
        for field in ("state_digest", "structure_digest", "num_parameters")
        if getattr(stored, field) != getattr(given, field)
    )
    if differing:
        names = ", ".join(field for field, _, _ in differing)
        raise StoreMismatchError(f"{store.path} was made with another model: {names} differ", differing)


def _matching_samples(store: KernelStore, given: object, record: DataRecord | None, split: str) -> Samples:
    if record is None:
        raise ConfigError(f"{store.path} was made without test_inputs, but test_inputs were given")
    samples = as_samples(given, label=f"{split} inputs")
    inspected = samples.inspect(f"{split} inputs")
    if inspected.inputs_digest != record.inputs_digest:
        raise StoreMismatchError(
            f"the {split} inputs are not those that {store.path} was made with: it holds {record.num_samples} samples "
            f"of {record.inputs}, given are {inspected.num_samples} of {inspected.inputs}",
            ((f"{split}.inputs_digest", record.inputs_digest, inspected.inputs_digest),),
        )
    return samples


def certify(
    store: KernelStore, witness: Witness, *, seed: int = 0, step: Callable[[], None] = lambda: None
) -> tuple[Certificate, ...]:
    """Certify every kernel of a complete store.

    Parameters
    ----------
    store
        The store, its tiles already verified.
    witness
        The model and samples that it was made with.
    seed
        Of the sign vector.
    step
        Called after each batch of each pass.
    """
    manifest, sources = store.manifest, witness.sources
    on_the_way = (manifest.compute_dtype, manifest.accumulate_dtype, manifest.store_dtype)
    coarsest = max(on_the_way, key=lambda dtype: _TOLERANCE[dtype])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=store.train.shape[1])
    directions = [each.transposed(sources["train"], signs, step) for each in witness.products]
    diagonal = store.train.diagonal().astype(np.float64)

    def product(source: Source) -> NDArray[np.float64]:
        pairs = zip(witness.products, directions, strict=True)
        return np.sum([each.product(source, direction, step) for each, direction in pairs], axis=0)  # type: ignore[no-any-return]

    exact = product(sources["train"])
    found = [_judge("kernel/train", store.train, signs, exact, diagonal, diagonal.sum(), coarsest)]
    if manifest.test is not None:
        exact = product(sources["test"])
        rows = np.diagonal(store.test_diagonal, axis1=1, axis2=2).reshape(-1).astype(np.float64)
        kernel = store.test_train
        found.append(_judge("kernel/test_train", kernel, signs, exact, rows, diagonal.sum(), coarsest))
    return tuple(found)


def with_certificates(report: VerificationReport, certificates: tuple[Certificate, ...]) -> VerificationReport:
    """A report with certificates, and a finding for each that is not good."""
    findings = tuple(
        Finding(
            certificate.array,
            (),
            f"K v and J(J'v) differ by up to {certificate.error:.1e} (tolerance {certificate.tolerance:.0e}, median "
            f"{certificate.median_error:.1e}); suspect rows: {', '.join(map(str, certificate.suspect_rows)) or 'none'}",
        )
        for certificate in certificates
        if not certificate.is_good
    )
    return replace(
        report,
        findings=report.findings + findings,
        certificates=tuple(certificate.to_json() for certificate in certificates),
    )


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
