"""Log-determinants with little memory: ntkpipe's Cholesky in files against detkit; with much, LAPACK and Dask."""

from pathlib import Path

from ntkpipe.base.resources import format_bytes
from solving.measuring import in_child, median, print_table, ratio
from solving.stores import made_up

_METHODS = ("ntkpipe", "detkit", "ntkpipe, in memory", "LAPACK", "Dask")
_TILE = 1024


def compare(folder: Path, repeats: int, num_rows: int) -> None:
    """Seconds and memory of each method, in processes of their own, in turns."""
    path = folder / "definite.zarr"
    made_up(path, num_rows, min(_TILE, num_rows // 8))
    full = 8 * num_rows**2
    allowance = full // 4
    print(
        f"\nLog-determinant of {num_rows:,} rows, in float64 {format_bytes(full)}; ntkpipe and detkit may allocate "
        f"{format_bytes(allowance)}",
        flush=True,
    )
    found: dict[str, list[dict]] = {method: [] for method in _METHODS}
    for _ in range(repeats):
        for method in _METHODS:
            if not any("failure" in one for one in found[method]):
                found[method].append(in_child("determinant", method, path, allowance))
    ours = [one.get("seconds", float("nan")) for one in found["ntkpipe"]]
    expected, rows = found["LAPACK"][0].get("logdet", float("nan")), []
    for method, runs in found.items():
        if "failure" in runs[-1]:
            rows.append((method, "—", "", "", runs[-1]["failure"]))
            continue
        seconds = [one["seconds"] for one in runs]
        grown, error = max(one["grown"] for one in runs), abs(runs[0]["logdet"] - expected)
        times = f"{median(seconds):.2f}", f"{ratio(seconds, ours):.2f}"
        rows.append((method, *times, format_bytes(grown), f"{error:.1e}"))
    print_table(("method", "seconds", "vs ntkpipe", "memory grows by", "from LAPACK's"), rows)
