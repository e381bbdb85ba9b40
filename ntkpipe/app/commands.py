"""The commands of solvers and analyses: parse, call one function, print. Loaded without torch."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from ntkpipe.base.config import parse_bytes
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.tables import print_rows
from ntkpipe.store.kernel_store import open_kernel

if TYPE_CHECKING:
    from distributed import Client

    from ntkpipe.solvers.result import Result

_array = click.option("--array", default="train", show_default=True, help="Which kernel, as groups/NAME/train.")
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random choices.")
_memory_limit = click.option(
    "--memory-limit", metavar="BYTES", help="Memory of this process, as 8GiB; on a cluster of each worker."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Options that every solver has."""
    scheduler = click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Multiply on a Dask cluster whose workers keep tiles: tcp://host:8786, tls://…, or local.",
    )
    most = click.option("--max-passes", type=int, help="Largest number of products with the matrix.")
    options = (click.argument("store", metavar="STORE"), _array, _seed, most, _memory_limit, scheduler, _as_json)
    for option in reversed(options):
        command = option(command)
    return command


_ridge = click.option("--ridge", type=float, default=0.0, show_default=True, help="λ that is added to the diagonal.")
_ridge_scale = click.option(
    "--ridge-scale", type=click.Choice(["mean_diagonal"]), help="What --ridge is a multiple of.  [default: absolute]"
)

_path = click.option(
    "--path", metavar="FOLDER", help="For a Cholesky factor that does not fit in memory: half of n² float64 numbers."
)


@click.command()
@click.option("-k", "k", type=int, default=100, show_default=True, help="Number of pairs.")
@click.option("--tol", type=float, default=1e-6, show_default=True, help="Relative residual of each pair.")
@click.option("--block", type=int, help="Columns of a pass.  [default: k/2]")
@_common
def eigsh(store: str, **options: Any) -> None:
    """Leading eigenpairs of the kernel of STORE, kept in results/eigsh."""
    _solve(store, "eigsh", options)


@click.command()
@_ridge
@_ridge_scale
@click.option(
    "--method",
    type=click.Choice(["auto", "pcg", "block_cg", "cholesky"]),
    default="auto",
    show_default=True,
    help="Method; the result says what auto chose and why.",
)
@click.option("--tol", type=float, default=1e-6, show_default=True, help="True residual of each column.")
@click.option("--rank", type=int, help="Rank of the preconditioner.  [default: n/10, at most 1000]")
@click.option("--preconditioner", type=click.Choice(["rpcholesky", "nystrom"]), default="rpcholesky", show_default=True)
@_path
@_common
def solve(store: str, **options: Any) -> None:
    """Kernel regression (K + λI) A = Y with the targets of STORE, kept in results/solve."""
    _solve(store, "solve", options)


@click.command()
@_ridge
@click.option(
    "--method",
    type=click.Choice(["cholesky", "slq"]),
    default="cholesky",
    show_default=True,
    help="Exact, or an estimate with its errors.",
)
@click.option("--jitter", type=click.Choice(["auto"]), help="Raise the diagonal where a pivot is not positive.")
@_path
@click.option("--probes", "num_probes", type=int, help="Random vectors of slq.  [default: 16]")
@click.option("--tol", type=float, help="Largest error of slq, per row.  [default: 0.01]")
@click.option("--rank", type=int, help="Rank of slq's preconditioner.  [default: n/10, at most 1000]")
@_common
def logdet(store: str, ridge: float, method: str, seed: int, **options: Any) -> None:
    """Log determinant of K + λI for the kernel of STORE, kept in results/logdet."""
    given = {**options, "ridge": ridge, "method": method, "seed": seed if method == "slq" else None}
    _solve(store, "logdet", given)


@click.command()
@click.option("--probes", "num_probes", type=int, default=16, show_default=True, help="Random vectors.")
@click.option("--steps", "num_steps", type=int, help="Passes; as many as --tol needs if not given.")
@click.option("--tol", type=float, default=0.05, show_default=True, help="Largest error of a count, as a part of n.")
@_common
def density(store: str, max_passes: int | None, **options: Any) -> None:
    """Spectral density of the kernel of STORE, kept in results/density. Pairs in results/eigsh are counted exactly."""
    given = options if max_passes is None else {**options, "max_passes": max_passes}
    _solve(store, "density", given)


@click.command()
@click.argument("store", metavar="A")
@click.argument("other", metavar="B")
@_array
@click.option("-k", "k", type=int, default=10, show_default=True, help="Dimension of the leading eigenspaces.")
@_ridge
@_ridge_scale
@click.option(
    "--smallest/--no-smallest", "smallest_eigenvalue", default=True, help="Look for λ_min, too: most of the cost."
)
@_seed
@_memory_limit
@_as_json
def compare(store: str, other: str, as_json: bool, memory_limit: str | None, **options: Any) -> None:
    """Compare the kernel of store A with that of B, the reference; kept in results/compare of A.

    Entries, spectra, leading eigenspaces and predictions. A pNTK beside a full NTK stands for K ⊗ I.
    """
    from ntkpipe.analysis.steps import compare_of_store  # keeps scipy out of other commands

    found = compare_of_store(open_kernel(store), other=other, memory_limit=bytes_of(memory_limit), **options)
    show_result(f"compare {store}", found, as_json=as_json)


COMMANDS = (eigsh, solve, logdet, density, compare)


def bytes_of(memory_limit: str | None) -> int | None:
    """Bytes of an option such as ``8GiB``."""
    return None if memory_limit is None else parse_bytes("memory_limit", memory_limit)


def _solve(store: str, solver: str, options: dict[str, Any]) -> None:
    """Call a solver and print what it found."""
    from ntkpipe.solvers.steps import SOLVERS  # keeps scipy out of other commands

    scheduler, as_json, limit = options.pop("scheduler"), options.pop("as_json"), bytes_of(options.pop("memory_limit"))
    opened = open_kernel(store)
    with _client(scheduler) as client:
        found = SOLVERS[solver](opened, memory_limit=limit, client=client, **options)
    show_result(f"{solver} {store}", found, as_json=as_json)


def show_result(title: str, found: "Result", *, as_json: bool) -> None:
    """Print a result; exit with 1 if it did not converge."""
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_rows(title, found.rows())
    if not found.is_converged:
        sys.exit(1)


@contextlib.contextmanager
def _client(scheduler: str | None) -> Iterator["Client | None"]:
    if scheduler is None:
        yield None
        return
    try:
        from ntkpipe.executors.connect import connect  # keeps distributed out of runs on one machine
    except ModuleNotFoundError as error:
        raise ConfigError(f"--scheduler needs Dask's distributed ({error}); install ntkpipe[cluster]") from error
    with connect(scheduler) as client:
        yield client
