"""Comparing two kernels of the same samples: entries, spectra, eigenspaces, predictions.

In memory: all eigenvalues by LAPACK up to 2,048 rows; beyond that λ_min by inverse iteration with a Cholesky factor,
its lower bound proved by another; predictions by a factor, or by all eigenpairs where there is no ridge and the kernel
is singular. Otherwise by passes over the tiles: λ_min by block Davidson, whose lower bound rests on none having been
missed, predictions by conjugate gradients to a true residual of 1e-10, and no log-determinant.

Memory: ``24 n²`` bytes, one kernel at a time, where that fits; else a tile of each, or as many as the limit allows;
vectors, ``8 n (11 k + 60)`` bytes, and for passes ``24 n rank`` with the rank of a preconditioner, min(1000, n/10).
Cost: every tile of both once, diagonal ones twice, of different tiles some of the smaller ones up to four times;
spectra by passes: 15 for leading pairs, 100 for λ_min.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import subspace_angles

from ntkpipe.analysis.comparing.entries import measure_differences
from ntkpipe.analysis.comparing.inputs import (
    KernelInput,
    differing_fields,
    has_same_test_samples,
    inputs_of,
    require_comparable,
    targets_of,
)
from ntkpipe.analysis.comparing.result import Comparison
from ntkpipe.analysis.comparing.spectra import Ends, How, Way, angle_error, find_ends, outer_ends, ratios_of, way_for
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, absolute_ridge, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, Work, digest_of
from ntkpipe.base.targets import Targets, Task, as_rows, encode, encode_test
from ntkpipe.learning.regression.sources import CrossKernel
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.checkpoint import Stages
from ntkpipe.solvers.inverse.passes import recurrence_for
from ntkpipe.solvers.inverse.solve import solve
from ntkpipe.solvers.memory import bytes_of_solve
from ntkpipe.solvers.result import Monitor, Status, ignore, recorded
from ntkpipe.store.results import Checkpoint

if TYPE_CHECKING:
    from distributed import Client


_TOL = 1e-10  # of predictions


class _Goal(NamedTuple):
    """What is predicted."""

    targets: Targets  # of train samples
    test_targets: Targets | None  # of test samples, if there are any


@dataclass(frozen=True)
class _Found:
    """What was found of one kernel."""

    ends: Ends
    predictions: Mapping[str, Any] | None
    identity: str
    way: Way
    work: Work


@recorded()
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
    task: Task = "auto",
    memory_limit: MemoryLimit = None,
    client: "Client | None" = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> Comparison:
    """Compare kernel A with kernel B, the reference, on the same samples.

    Entries are compared exactly, in float64, by one pass over the tiles of both in step. Where one is a full NTK of
    N·O rows and the other K has one row a sample, as a pNTK or the limit of infinite width, the latter is ``K ⊗ I_O``
    (Mohamadi, Bae, Sutherland 2023, arXiv 2206.12543), of which only strips of a tile ever exist; differences of full
    NTKs are also split by outputs. Leading eigenpairs are found to a true residual of 1e-10; how the rest is found is
    in :mod:`ntkpipe.analysis.comparing.compare`, and ``method`` of the result says which. Nothing below the storage
    floor is given as a ratio: ``smallest_eigenvalue_note`` says so instead.

    Parameters
    ----------
    a
        Kernel A: a store or its path, a stored kernel, a symmetric array, or an operator.
    b
        Kernel B, the reference, in the same forms.
    array
        Kernel of a store that is compared, such as ``train``, or ``groups/head/kernel/train``.
    num_outputs
        Number of outputs O of arrays and operators that are full NTKs, row = sample * O + output. They are the one that
        has more rows, or both where they have as many. Default that of a stored full NTK beside it, or one.
    targets
        Labels of classes (N,), or real targets (N,) or (N, c). Default those of the stores, if they have any.
    test_targets
        Targets of the test samples. Default those of the stores, if they have any.
    test_kernels
        Test × train kernels of A and of B, (M·S, N·S), arrays or stored. Default those of the stores.
    k
        Dimension of the leading eigenspaces that are compared, at most N; ``k O`` where one is ``K ⊗ I_O``.
    ridge
        Ridge λ of both regressions and log-determinants.
    smallest_eigenvalue
        Whether λ_min is looked for, which is most of the cost where kernels do not fit in memory.
    eigenpairs
        Known eigenpairs of A and of B, descending. They are used if there is one more than k; all n save LAPACK, too.
    memory_limit
        Bytes that this process may have; default what it has and half of what is free. A tile of each and vectors are
        taken in any case. With a client the limit is of each worker.
    client
        Client of a Dask cluster that multiplies; entries are compared here.

    Raises
    ------
    ConfigError, NonFiniteError
        If the kernels are not of the same samples (the message has the fields of the manifests that differ), B is
        zero, or an option is wrong; if one of them holds NaN or infinity.
    """
    budget = Budget.of(memory_limit)
    inputs = inputs_of(a, b, array=array, num_outputs=num_outputs, test_kernels=test_kernels)
    width = require_comparable(*inputs)
    check_number("k", k, low=1)
    goal, note = _goal_of(inputs, targets, test_targets, task=task, are_kernels_given=test_kernels is not None)
    decides: dict[str, Any] = {"k": k, "ridge": ridge, "ridge_scale": ridge_scale, "seed": seed}
    if checkpoint is not None:
        decides |= {f"matrix_{name}": one.identity for name, one in zip("ab", inputs, strict=True)}
        decides |= {"function": "compare_kernels", "smallest": smallest_eigenvalue}
        known = {} if goal is None else goal._asdict()
        decides |= {name: digest_of(one.matrix) for name, one in known.items() if one is not None}
    stages = Stages(checkpoint, decides)
    measured = dict(stages.once("entries", lambda: measure_differences(*(one.entries() for one in inputs))))
    if measured["frobenius_b"] == 0:
        raise ConfigError(f"{inputs[1].name} is zero, so nothing is relative to it; give it as a")
    for name in ("relative_difference", "scaled_difference"):
        measured[name] /= measured["frobenius_b"]
    if (parts := measured.get("difference_by_outputs")) is not None:
        measured["difference_by_outputs"] = tuple(part / measured["frobenius_b"] for part in parts)
    measured["largest_entry"] = None if measured["largest_entry"] is None else tuple(measured["largest_entry"])
    count = min(k, inputs[0].num_samples)
    found, ridges = [], []
    for name, one, given in zip("ab", inputs, eigenpairs or (None, None), strict=True):
        diagonal = measured.pop(f"diagonal_{name}")[:: width // one.width]
        ridges.append(absolute_ridge(ridge, ridge_scale, partial(np.asarray, diagonal)))
        way = way_for(one.num_samples * one.width, budget if client is None else Budget())
        how = How(way, ridges[-1], budget, seed, monitor)
        # A full NTK beside K ⊗ I_O needs O times as many leading eigenpairs as K.
        leading = count if inputs[0].width == inputs[1].width else count * one.width
        wanted = {"k": leading, "with_smallest": smallest_eigenvalue, "given": given}
        found.append(_find(name, one, how, wanted, width // one.width, goal, stages, client))
    first, second = found
    predicted = {}
    if goal is not None and first.predictions is not None and second.predictions is not None:
        predicted = _compare_predictions(first.predictions["values"], second.predictions["values"], goal)
    status, message = _judge(first, second)
    return Comparison(
        status=status,
        message=message,
        work=Work(1.0, measured.pop("bytes_read"), 0.0) + first.work + second.work,
        options={"k": count},
        matrix=first.identity,
        reference=second.identity,
        method=_method(first, second),
        ridge_a=ridges[0],
        ridge_b=ridges[1],
        **({} if goal is None else goal.targets.fields),
        a=inputs[0].name,
        b=inputs[1].name,
        kinds=(inputs[0].kind, inputs[1].kind),
        differs=differing_fields(*inputs),
        num_samples=inputs[0].num_samples,
        num_rows=inputs[0].num_samples * width,
        num_outputs=width,
        outer=next((name for name, kernel in zip("ab", inputs, strict=True) if kernel.width < width), None),
        **measured,
        **_spectral_fields(first.ends, second.ends),
        prediction_note=note,
        **predicted,
    )


def _find(
    name: str,
    kernel: KernelInput,
    how: How,
    wanted: Mapping[str, Any],
    num_copies: int,
    goal: _Goal | None,
    stages: Stages,
    client: "Client | None",
) -> _Found:
    """The wanted ends of one spectrum, of ``K ⊗ I`` of so many copies, and predictions."""
    with kernel.operator(how.budget, client) as stored:
        matrices = [stored]  # and, unless it is multiplied by passes, the whole, once something is computed

        def spent() -> Work:
            return sum((one.work for one in matrices), Work())

        def once(part: str, function: Callable[..., Mapping[str, Any]], **options: Any) -> dict[str, Any]:
            def computed() -> dict[str, Any]:
                before = spent()
                if how.way != "passes" and len(matrices) == 1:
                    rows = slice(0, stored.num_rows)
                    matrices.append(DenseOperator(stored.block(rows, rows), storage_dtype=stored.storage_dtype))
                found = function(matrices[-1], how, stages.part(part), **options)
                return {**found, "work": spent() - before}

            return dict(stages.once(part, computed))

        spectrum = once(f"spectrum-{name}", find_ends, **wanted)
        work, predicted = spectrum.pop("work"), None
        if goal is not None:
            predicted = once(f"predictions-{name}", _predict, kernel=kernel, goal=goal)
            work += predicted["work"]
        return _Found(outer_ends(Ends(**spectrum), num_copies), predicted, stored.identity(), how.way, work)


def _spectral_fields(a: Ends, b: Ends) -> dict[str, Any]:
    # Their cosines are the singular values of AᵀB (Björck, Golub 1973, Numerical methods for computing angles between
    # linear subspaces, Math. Comp. 27, Theorem 1). SciPy takes small ones from sines, which have digits where cosines
    # are near one (Knyazev, Argentati 2002, SIAM J. Sci. Comput. 23).
    angles = np.asarray(subspace_angles(a.eigenvectors, b.eigenvectors)[::-1], np.float64)
    found = ratios_of(a, b) | {
        "largest_eigenvalue_ratio": float(a.eigenvalues[0]) / float(b.eigenvalues[0]),
        "principal_angles": angles,
        "angle_error": angle_error(a, b),
        "overlap": float(np.mean(np.cos(angles) ** 2)),
    }
    for name, ends in (("a", a), ("b", b)):
        found |= {
            f"eigenvalues_{name}": ends.eigenvalues,
            f"smallest_eigenvalue_{name}": ends.smallest,
            f"smallest_eigenvalue_bounds_{name}": None if ends.high is None else (ends.low, ends.high),
            f"log_determinant_{name}": ends.log_determinant,
            f"floor_{name}": ends.floor,
        }
    return found


def _method(first: _Found, second: _Found) -> str:
    words = {
        "lapack": "LAPACK in memory, float64",
        "factor": "block Lanczos and Cholesky in memory, float64",
        "passes": "passes over the tiles, which do not fit the memory limit",
    }
    if first.way == second.way:
        return words[first.way]
    return f"A by {words[first.way]}; B by {words[second.way]}"


def _judge(first: _Found, second: _Found) -> tuple[Status, str]:
    for name, found in (("A", first), ("B", second)):
        for part in (vars(found.ends), found.predictions or {}):
            if part.get("status", "converged") != "converged":
                return part["status"], f"of {name}: {part['message']}"
    return "converged", "entries are compared exactly, spectra and predictions to true residuals of 1e-10"


def _goal_of(
    inputs: tuple[KernelInput, KernelInput],
    targets: ArrayLike | None,
    test_targets: ArrayLike | None,
    *,
    task: Task,
    are_kernels_given: bool,
) -> tuple[_Goal | None, str]:
    """What two kernels can both predict; and why there is no such thing, or what is to be known of it."""
    if any(one.test_kernel is None for one in inputs):
        return None, "no test kernels"
    targets = targets_of(*inputs, "train") if targets is None else targets
    if targets is None:
        return None, "no targets"
    if not are_kernels_given and not has_same_test_samples(*inputs):
        return None, "test samples of the stores are not the same"
    test_targets = targets_of(*inputs, "test") if test_targets is None else test_targets
    width, num_samples = max(one.width for one in inputs), inputs[0].num_samples
    train = encode(targets, task=task, num_outputs=width if width > 1 else None)
    if len(train.matrix) != num_samples:
        raise ConfigError(f"{len(train.matrix)} targets for {num_samples} train samples")
    as_rows(train.matrix, width)  # or refuse them
    if test_targets is None:
        return _Goal(train, None), ""
    test = encode_test(test_targets, train)
    return _Goal(train, test), test.note.removeprefix("; ")


def _predict(
    operator: Operator, how: How, checkpoint: Checkpoint | None, *, kernel: KernelInput, goal: _Goal
) -> dict[str, Any]:
    """Predictions ``K_test (K + λ I)⁺ Y`` of kernel ridge regression, (M, c), with status and message of the solver."""
    cross = CrossKernel(kernel.test_kernel, operator.num_rows, kernel.width)
    rows = as_rows(goal.targets.matrix, kernel.width)
    room = how.budget.at_least(bytes_of_solve(operator.num_rows, rows.shape[1]))
    by_passes: dict[str, Any] = {}
    if how.way == "passes":
        by_passes = {"method": recurrence_for(rows.shape[1]), "checkpoint": checkpoint}
    common: dict[str, Any] = {"tol": _TOL, "seed": how.seed, "memory_limit": room, "monitor": how.monitor}
    solution = solve(operator, rows, ridge=how.ridge, task="regression", **common, **by_passes)
    values = np.ascontiguousarray(cross.outputs(solution.coefficients))
    return {"values": values, "status": solution.status, "message": solution.message}


def _compare_predictions(a: FloatArray, b: FloatArray, goal: _Goal) -> dict[str, Any]:
    """How far predictions of two kernels are apart, shape (M, c) each, by the fields of the comparison."""
    wanted = goal.test_targets
    if len(a) != len(b) or (wanted is not None and len(wanted.matrix) != len(a)):
        targets = "" if wanted is None else f", and {len(wanted.matrix)} test targets"
        raise ConfigError(f"test kernels of {len(a)} and {len(b)} samples{targets}; needed the same test samples")
    norm = float(np.linalg.norm(b))
    differs = None
    if a.shape[1] > 1 or goal.targets.is_binary:
        differs = float(np.mean(goal.targets.predicted(a) != goal.targets.predicted(b)))
    found: dict[str, Any] = {
        "prediction_difference": float(np.linalg.norm(a - b)) / norm if norm else None,
        "disagreement": differs,
    }
    for name, values in (("a", a), ("b", b)):
        found[f"predictions_{name}"] = values
        found[f"test_loss_{name}"] = None if wanted is None else wanted.loss(values)
        found[f"test_accuracy_{name}"] = None if wanted is None else wanted.accuracy(values)
    return found
