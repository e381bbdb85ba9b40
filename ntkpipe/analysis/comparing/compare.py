"""Comparing two kernels of the same samples: entries, spectra, eigenspaces, predictions.

For a kernel that fits in memory: all eigenvalues by LAPACK up to 2,048 rows; beyond that λ_min by inverse iteration
with a Cholesky factor, its lower bound proved by another; predictions by a factor, those of a singular kernel without a
ridge by the eigenpairs that are not zero. Where it does not fit, everything comes from passes over the tiles: λ_min by
block Davidson, whose lower bound rests on none having been missed, predictions by conjugate gradients to a true
residual of 1e-10, and there is no log-determinant.

Memory: the kernels and copies (24 n² bytes, one at a time) where they fit; else a tile of each, or as many as the limit
allows; vectors come on top, ``8 n (11 k + 60)`` bytes, and for a kernel that does not fit ``24 n rank`` with the rank
of a preconditioner, min(1000, n/10). Cost: every tile of both once, diagonal ones twice; of different tiles some of the
smaller ones up to four times; spectra of kernels that do not fit: 15 passes for leading pairs, 100 for λ_min.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.analysis.comparing.entries import Differences, measure_differences
from ntkpipe.analysis.comparing.inputs import KernelInput, differing_fields, inputs_of, require_comparable
from ntkpipe.analysis.comparing.predictions import Goal, Predictions, compare_predictions, goal_of, predict
from ntkpipe.analysis.comparing.result import Comparison
from ntkpipe.analysis.comparing.spectra import (
    Ends,
    Way,
    angle_error,
    find_ends,
    in_memory,
    outer_ends,
    principal_angles,
    ratios_of,
    way_for,
)
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Work
from ntkpipe.base.ridge import RidgeScale, absolute_ridge
from ntkpipe.solvers.result import Monitor, Status, ignore

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class _Wanted:
    """What is to be found of each kernel."""

    k: int
    ridge: float
    ridge_scale: RidgeScale
    with_smallest: bool
    seed: int
    memory_limit: int | None
    client: "Client | None"
    monitor: Monitor


@dataclass(frozen=True)
class _Found:
    """What was found of one kernel."""

    ends: Ends
    predictions: Predictions | None
    ridge: float
    identity: str
    way: Way
    work: Work


def compare_kernels(
    a: Any,
    b: Any,
    *,
    array: str = "train",
    num_outputs: int | None = None,
    targets: ArrayLike | None = None,
    test_targets: ArrayLike | None = None,
    test_kernels: tuple[Any, Any] | None = None,
    k: int = 10,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    smallest_eigenvalue: bool = True,
    eigenpairs: tuple[Any, Any] | None = None,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    seed: int = 0,
    monitor: Monitor = ignore,
) -> Comparison:
    """Compare kernel A with kernel B, the reference, on the same samples.

    Entries are compared exactly, in float64, by one pass over the tiles of both in step. Where one is a full NTK of
    N·O rows and the other K has one row a sample, as a pNTK, the latter is ``K ⊗ I_O`` (Mohamadi, Bae, Sutherland 2023,
    arXiv 2206.12543), of which only strips of a tile ever exist. Leading eigenpairs are found to a true residual of
    1e-10; how the rest is found is in :mod:`ntkpipe.analysis.comparing.compare`, and ``method`` of the result says
    which. Nothing below the storage floor is given as a ratio: ``smallest_eigenvalue_note`` says so instead.

    Parameters
    ----------
    a, b, array
        Each a store or its path, a stored kernel, a symmetric array, or an operator; and which kernel of a store, as
        ``train``, or ``groups/head/kernel/train``.
    num_outputs
        O of arrays and operators that are full NTKs, row = sample * O + output: of the one that has more rows, or of
        both where they have as many; default that of a stored full NTK beside it, or one.
    targets, test_targets, test_kernels
        Shape (N,) for classes, or (N, c); and (M,) or (M, c). Test × train of A and of B: arrays or stored kernels,
        shapes (M·S, N·S). Default those of the stores, if they have any.
    k, eigenpairs
        Dimension of the leading eigenspaces that are compared, at most N; ``k O`` where one is ``K ⊗ I_O``. Known pairs
        of A and B, ``eigenvalues`` descending and ``eigenvectors``: used if one more than k; all n save LAPACK, too.
    ridge, ridge_scale, smallest_eigenvalue
        λ of both regressions and log-determinants, absolute; with ``"mean_diagonal"`` times the mean diagonal of each.
        Whether λ_min is looked for, which is most of the cost where kernels do not fit in memory.
    memory_limit, client
        Bytes that this process may have; default what it has and half of what is free; a tile of each and vectors in
        any case. A Dask cluster that multiplies (entries are compared here); the limit is of each worker then.
    seed, monitor
        Seed of the first blocks; function that is called after each pass.

    Raises
    ------
    ConfigError, NonFiniteError
        If the kernels are not of the same samples (the message has the fields of the manifests that differ), B is
        zero, or an option is wrong; if one of them holds NaN or infinity.
    ResourceError, TileError
        If the limit leaves no room for the tiles in use; if a tile is missing or damaged.
    """
    started = perf_counter()
    inputs = inputs_of(a, b, array=array, num_outputs=num_outputs, test_kernels=test_kernels)
    width = require_comparable(*inputs)
    check_number("k", k, low=1)
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, low=1)
    goal, note = goal_of(inputs, targets, test_targets, are_kernels_given=test_kernels is not None)
    measured = measure_differences(inputs[0].entries(width), inputs[1].entries(width))
    if measured.frobenius_b == 0:
        raise ConfigError(f"{inputs[1].name} is zero, so nothing is relative to it; give it as a")
    k, ridge, seed = min(int(k), inputs[0].num_samples), float(ridge), int(seed)
    wanted = _Wanted(k, ridge, ridge_scale, smallest_eigenvalue, seed, memory_limit, client, monitor)
    first, second = _find_both(inputs, width, measured, goal, wanted, eigenpairs or (None, None))
    options = {"array": array, "k": k, "ridge": ridge, "ridge_scale": ridge_scale}
    options |= {"smallest_eigenvalue": bool(smallest_eigenvalue), "memory_limit": memory_limit, "seed": seed}
    status, message = _judge(first, second)
    fields = _input_fields(inputs, width) | _entry_fields(measured) | _spectral_fields(first.ends, second.ends)
    return Comparison(
        status=status,
        message=message,
        work=Work(1.0, measured.bytes_read, 0.0) + first.work + second.work,
        seconds=perf_counter() - started,
        options=options,
        matrix=first.identity,
        reference=second.identity,
        method=_method(first, second),
        ridge_a=first.ridge,
        ridge_b=second.ridge,
        **fields,
        **_prediction_fields(goal, first.predictions, second.predictions, note),
    )


def _find_both(
    inputs: tuple[KernelInput, KernelInput],
    width: int,
    measured: Differences,
    goal: Goal | None,
    wanted: _Wanted,
    eigenpairs: tuple[Any, Any],
) -> tuple[_Found, _Found]:
    a, b = inputs
    # A full NTK beside K ⊗ I_O needs O times as many leading eigenpairs as K.
    counts = [wanted.k if a.width == b.width else wanted.k * kernel.width for kernel in inputs]
    first = _find(a, width, counts[0], measured.diagonal_a, goal, wanted, eigenpairs[0])
    return first, _find(b, width, counts[1], measured.diagonal_b, goal, wanted, eigenpairs[1])


def _find(
    kernel: KernelInput, width: int, count: int, diagonal: FloatArray, goal: Goal | None, wanted: _Wanted, given: Any
) -> _Found:
    """The ends of one spectrum, expanded to ``width`` rows a sample, and predictions."""
    num_outputs = width // kernel.width
    diagonal = diagonal[::num_outputs]
    ridge = absolute_ridge(wanted.ridge, wanted.ridge_scale, lambda: diagonal)
    limit = wanted.memory_limit
    way = way_for(len(diagonal), None if wanted.client is not None else limit)
    how: dict[str, Any] = {"way": way, "seed": wanted.seed, "monitor": wanted.monitor}
    with kernel.operator(limit, wanted.client) as stored:
        before, identity = stored.work, stored.identity()
        operator = stored if way == "passes" else in_memory(stored)
        ends = find_ends(operator, count, ridge=ridge, with_smallest=wanted.with_smallest, given=given, **how)
        predictions = None
        if goal is not None:
            predictions = predict(
                operator,
                kernel.test_kernel,
                kernel.width,
                goal,
                ridge=ridge,
                largest=float(ends.eigenvalues[0]),
                memory_limit=limit,
                **how,
            )
        done = stored.work - before + (Work() if operator is stored else operator.work)
        return _Found(outer_ends(ends, num_outputs), predictions, ridge, identity, way, done)


def _input_fields(inputs: tuple[KernelInput, KernelInput], width: int) -> dict[str, Any]:
    a, b = inputs
    return {
        "a": a.name,
        "b": b.name,
        "kinds": (a.kind, b.kind),
        "differs": differing_fields(a, b),
        "num_samples": a.num_samples,
        "num_rows": a.num_samples * width,
        "num_outputs": width,
        "outer": next((name for name, kernel in zip("ab", inputs, strict=True) if kernel.width < width), None),
    }


def _entry_fields(measured: Differences) -> dict[str, Any]:
    norm = measured.frobenius_b
    return {
        "frobenius_a": measured.frobenius_a,
        "frobenius_b": norm,
        "relative_difference": measured.difference / norm,
        "scale": measured.scale,
        "scaled_difference": measured.scaled_difference / norm,
        "alignment": measured.alignment,
        "centred_alignment": measured.centred_alignment,
        "largest_entry_difference": measured.largest,
        "largest_entry": measured.largest_at,
        "num_zero_rows": measured.num_zero_rows,
    }


def _spectral_fields(a: Ends, b: Ends) -> dict[str, Any]:
    angles = principal_angles(a.eigenvectors, b.eigenvectors)
    return ratios_of(a, b) | {
        "eigenvalues_a": a.eigenvalues,
        "eigenvalues_b": b.eigenvalues,
        "largest_eigenvalue_ratio": float(a.eigenvalues[0]) / float(b.eigenvalues[0]),
        "smallest_eigenvalue_a": a.smallest,
        "smallest_eigenvalue_b": b.smallest,
        "smallest_eigenvalue_bounds_a": None if a.high is None else (a.low, a.high),
        "smallest_eigenvalue_bounds_b": None if b.high is None else (b.low, b.high),
        "log_determinant_a": a.log_determinant,
        "log_determinant_b": b.log_determinant,
        "floor_a": a.floor,
        "floor_b": b.floor,
        "principal_angles": angles,
        "angle_error": angle_error(a, b),
        "overlap": float(np.mean(np.cos(angles) ** 2)),
    }


def _prediction_fields(
    goal: Goal | None, first: Predictions | None, second: Predictions | None, note: str
) -> dict[str, Any]:
    if goal is not None and first is not None and second is not None:
        return compare_predictions(first.values, second.values, goal) | {"prediction_note": note}
    names = ("predictions", "test_loss", "test_accuracy")
    missing = dict.fromkeys([f"{name}_{kernel}" for name in names for kernel in "ab"])
    return {**missing, "prediction_difference": None, "disagreement": None, "prediction_note": note}


def _method(first: _Found, second: _Found) -> str:
    """How spectra and predictions were found, of A and of B."""
    words = {
        "lapack": "LAPACK in memory, float64",
        "factor": "block Lanczos and Cholesky in memory, float64",
        "passes": "passes over the tiles, which do not fit the memory limit",
    }
    if first.way == second.way:
        return words[first.way]
    return f"A by {words[first.way]}; B by {words[second.way]}"


def _judge(first: _Found, second: _Found) -> tuple[Status, str]:
    """The first thing that did not converge, of either kernel."""
    for name, found in (("A", first), ("B", second)):
        for part in (found.ends, found.predictions):
            if part is not None and part.status != "converged":
                return part.status, f"of {name}: {part.message}"
    return "converged", "entries are compared exactly, spectra and predictions to true residuals of 1e-10"
