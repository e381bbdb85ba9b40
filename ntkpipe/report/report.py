"""The report of a store: gathered, put on a page, written whole or not at all."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.base.tables import TableRows
from ntkpipe.report.analyses import ANALYSES
from ntkpipe.report.gather import PageOptions, gather
from ntkpipe.solvers.result import Result
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.media.medium import writing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

_GENERATOR = b'<meta name="generator" content="ntkpipe">'
_HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Report(Result):
    """A report that was written."""

    path: str  # of the page
    num_bytes: int  # of it
    verdict: str  # the line in its header
    missing: tuple[tuple[str, str], ...]  # sections that lack something, with the sentence that says what

    def _rows(self) -> TableRows:
        return [
            ("page", f"{self.path}, {format_bytes(self.num_bytes)}"),
            ("verdict", self.verdict),
            *((f"not in it: {name}", why) for name, why in self.missing),
        ]


def require_libraries() -> None:
    """Check that what draws and writes pages is installed, before anything is computed for them."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"a report needs matplotlib and jinja2 ({error}); install ntkpipe[report]") from error


def write_report(
    store: KernelStore | str | Path,
    path: str | Path | None = None,
    *,
    array: str = "train",
    ridges: "Sequence[float] | None" = None,
    ridge_scale: RidgeScale = None,
    memory_limit: int | None = None,
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
        Of the page; default beside the store, as ``run.html`` for ``run.zarr``. A page that is there is replaced, any
        other file is not.
    array
        Which kernel, as ``train``, or ``groups/head/kernel/train``.
    ridges, ridge_scale
        λ of the regressions, absolute, or with ``"mean_diagonal"`` times the mean of the diagonal; default those of
        saved results, or of the analyses.
    memory_limit
        Bytes that analyses may have; what is available if none.
    client
        As for :func:`ntkpipe.as_operator`.
    progress
        Show on standard error what is computed.
    saved_only
        Show what steps have saved, and compute nothing but the picture: one pass.

    Raises
    ------
    ConfigError
        If matplotlib or jinja2 are not installed, there is no such array, or a file is there that is no report.
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
    target = _default_path(opened) if path is None else Path(path)
    _check_target(target)
    for ridge in ridges or ():
        check_number("ridge", ridge, low=0.0)
    options = PageOptions(
        array=array,
        ridges=None if ridges is None else tuple(float(ridge) for ridge in ridges),
        ridge_scale=ridge_scale,
        memory_limit=memory_limit,
        client=client,
        progress=progress,
        saved_only=saved_only,
    )
    gathered = gather(opened, options, ANALYSES)
    from ntkpipe.report.compose import compose, render_page  # loads matplotlib and jinja2

    page = compose(gathered)
    data = render_page(page).encode()
    folder = Folder(target.absolute().parent)
    with writing(folder):
        folder.put(target.name, data)
    return Report(
        status="converged",
        message="one page, which needs no network",
        work=gathered.work,
        seconds=perf_counter() - begin,
        options={
            "array": array,
            "ridges": options.ridges,
            "ridge_scale": ridge_scale,
            "memory_limit": memory_limit,
            "saved_only": saved_only,
        },
        matrix=gathered.matrix,
        path=str(target),
        num_bytes=len(data),
        verdict=page.verdict.lead + page.verdict.rest,
        missing=tuple((section.title, section.missing) for section in page.sections if section.missing),
    )


def _default_path(store: KernelStore) -> Path:
    """Beside a store of this machine; of one elsewhere in the working directory."""
    where = store.path
    if isinstance(where, Path):
        return where.absolute().parent / f"{where.name.removesuffix('.zarr')}.html"
    return Path(f"{where.rstrip('/').rpartition('/')[2].removesuffix('.zarr')}.html")


def _check_target(path: Path) -> None:
    """Check that a page can be put there."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent}; make it, or choose another path")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; needed the path of a file, as report.html")
    if path.exists():
        with path.open("rb") as file:
            if _GENERATOR not in file.read(_HEAD_BYTES):
                raise ConfigError(f"{path} is no report of ntkpipe, and stays; delete it, or choose another path")
