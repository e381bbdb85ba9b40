"""The report of a store: gathered, put on a page, written whole or not at all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ntkpipe.base.arguments import checked
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Work
from ntkpipe.base.paths import local_path, obstacle, said
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows, as_table
from ntkpipe.base.targets import Task
from ntkpipe.report.gather import Gathered
from ntkpipe.steps.run import run_step
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.media.medium import writing
from ntkpipe.store.results import reading_results

if TYPE_CHECKING:
    from distributed import Client

_GENERATOR = b'<meta name="generator" content="ntkpipe">'
_HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page that was written."""

    path: str  # of the page
    num_bytes: int  # of it
    verdict: str  # the line in its header
    is_good: bool  # whether nothing is known to be wrong with the store: it was verified so, or not verified yet
    missing: tuple[tuple[str, str], ...]  # sections that lack something, with the sentence that says what
    seconds: float  # of the whole call
    work: Work  # passes, bytes and seconds in products with the kernel for what was not saved before

    def rows(self) -> TableRows:
        """Rows of the printed table: quantity and value."""
        read = f", {format_bytes(self.work.bytes_read)} read" if self.work.bytes_read else ""
        cost = f"{self.work.passes:,.4g} passes{read}, {self.seconds:,.3g} s"
        return [
            ("page", f"{self.path}, {format_bytes(self.num_bytes)}"),
            ("verdict", self.verdict),
            *((f"not in it: {name}", why) for name, why in self.missing),
            ("cost", cost),
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return as_table(self.rows())


def require_libraries() -> None:
    """Check that what draws and writes pages is installed, before anything is computed for them."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"a report needs matplotlib and jinja2 ({said(error)}); install ntkpipe[report]") from error


@checked
def write_report(
    store: KernelStore | str | Path,
    path: str | Path | None = None,
    *,
    array: str = "train",
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    task: Task | None = None,
    memory_limit: MemoryLimit = None,
    client: "Client | None" = None,
    progress: bool = True,
    saved_only: bool = False,
) -> Report:
    """Write one HTML page on a stored kernel that needs no network: what it is, how it was checked, what it can do.

    Results that steps have saved in the store are taken as they are; what is missing is computed, and saved where the
    store can be written. All eigenpairs are computed once for all of it where they fit in memory (``40 n²`` bytes, or
    ``16 n²``), which dominates memory and time; where they do not, analyses are streamed, and say so.

    Parameters
    ----------
    store
        Path, or an open store.
    path
        Path of the page. Default beside the store, ``run.html`` for ``run.zarr``. A page that is there is replaced, any
        other file is not.
    array
        Which kernel, such as ``train`` or ``groups/head/train``.
    ridges
        Ridges λ of the regressions. Default those of saved results, or of the analyses.
    ridge_scale
        Unit of the ridges: None is absolute, ``"mean_diagonal"`` the mean of the diagonal.
    task
        What targets are, as for :class:`ntkpipe.KernelRegression`. Saved results that took them for something else are
        computed anew. Default what saved results took them for, else ``"auto"``.
    memory_limit
        Bytes that this process may have, or text such as ``8GiB``. Default what is available; with a client: of each
        worker.
    client
        A ``distributed.Client`` whose workers multiply, as for :func:`ntkpipe.as_operator`.
    progress
        Whether to show on standard error what is computed.
    saved_only
        Whether to show only what steps have saved, and compute nothing but the picture, one pass.

    Raises
    ------
    ArgumentError
        If there is no such argument.
    ConfigError
        If matplotlib or jinja2 are not installed, an argument is out of range or of another type, there is no such
        array, or a file is there that is no report.
    TileError
        If a tile is missing or damaged.
    StoreError
        If a result in the store is damaged, or the page cannot be written.
    Interrupted
        On Ctrl-C; what was computed before is saved, and the same call goes on from there.
    """
    require_libraries()
    begin = perf_counter()
    opened = store if isinstance(store, KernelStore) else open_kernel(store)
    target = _default_path(opened) if path is None else local_path(path)
    _check_target(target)
    for ridge in ridges or ():
        check_number("ridge", ridge, low=0.0)
    budget = Budget.of(memory_limit)
    across = {} if ridges is None else {"ridges": list(ridges), "ridge_scale": ridge_scale}
    run = partial(run_step, opened, array=array, memory_limit=budget, client=client, progress=progress)
    with reading_results(opened.path):
        gathered = Gathered(opened, array, across, None if saved_only else run, task, progress=progress)
        from ntkpipe.report.compose import compose, render_page  # loads matplotlib and jinja2

        page = compose(gathered)
        data = render_page(page).encode()
    folder = Folder(target.absolute().parent)
    with writing(folder):
        folder.put(target.name, data)
    return Report(
        path=str(target),
        num_bytes=len(data),
        verdict=page.verdict + page.worth,
        is_good=page.is_good is not False,
        missing=tuple((section.title, section.missing) for section in page.sections if section.missing),
        seconds=perf_counter() - begin,
        work=gathered.work,
    )


def _default_path(store: KernelStore) -> Path:
    """Beside a store of this machine; of one elsewhere in the working directory."""
    name = f"{Path(store.path).name.removesuffix('.zarr')}.html"
    return store.path.absolute().with_name(name) if isinstance(store.path, Path) else Path(name)


def _check_target(path: Path) -> None:
    if why := obstacle(path, writes=True, kind="file"):
        raise ConfigError(f"no report can be written to {path}: {why}; choose another path, such as report.html")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent}; make it, or choose another path")
    if path.exists():
        with path.open("rb") as file:
            if _GENERATOR not in file.read(_HEAD_BYTES):
                raise ConfigError(f"{path} is no report of ntkpipe, and stays; delete it, or choose another path")
