"""One network after another: its full NTK and pNTK are stored, compared, and what was found is a row of a table."""

import csv
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import factories
import numpy as np

import ntkpipe

STATES = ("init", "trained")
# Of the mean diagonal of each kernel.
RIDGE = 1e-3

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is computed.

    Attributes
    ----------
    widths
        Of each network that is looked at.
    seeds
        Each draws its own weights, train and test samples.
    states
        At initialisation, after training, or both.
    num_train, num_test
        Samples.
    steps
        Of training, each on 32 samples.
    dtype
        Of Jacobians and stores.
    """

    widths: dict[str, tuple[int, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    states: tuple[str, ...] = STATES
    num_train: int = 100
    num_test: int = 100
    steps: int = 160
    dtype: str = "float64"

    def cases(self) -> Iterator[Row]:
        """Every network, the narrow ones first."""
        for network, widths in self.widths.items():
            for width, seed, state in itertools.product(widths, self.seeds, self.states):
                yield {"network": network, "width": width, "seed": seed, "state": state}


def run(settings: Settings, folder: Path) -> list[Row]:
    """The table of all cases; rows that are in the folder's table already are not computed again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "table.json"
    about = {name: getattr(settings, name) for name in ("num_train", "num_test", "steps", "dtype")}
    known = json.loads(path.read_text()) if path.exists() else []
    rows = {_key(row): row for row in known if {name: row.get(name) for name in about} == about}
    found = []
    for case in settings.cases():
        row = rows.get(_key(case)) or {**case, **about, **measure(case, settings, folder / "stores")}
        rows[_key(case)] = row
        found.append(row)
        path.write_text(json.dumps(list(rows.values()), indent=1))
        print(_in_words(row), flush=True)
    _write_csv(found, folder / "table.csv")
    return found


def measure(case: Row, settings: Settings, folder: Path) -> Row:
    """Compare the pNTK of one network with its full NTK, the reference, with and without a ridge."""
    data = factories.data(settings.num_train, settings.num_test, seed=case["seed"])
    model = factories.NETWORKS[case["network"]](case["width"], case["seed"])
    accuracy = None
    if case["state"] == "trained":
        rate = _rate(model, data["inputs"])
        accuracy = factories.train(model, data["inputs"], data["targets"], rate=rate, steps=settings.steps)
    shutil.rmtree(folder, ignore_errors=True)
    options: Row = {**data, "compute_dtype": settings.dtype, "progress": False}
    full = ntkpipe.compute_kernel(model, kind="ntk", store=folder / "ntk.zarr", **options)
    pseudo = ntkpipe.compute_kernel(model, kind="pntk", store=folder / "pntk.zarr", **options)
    plain = ntkpipe.compare_kernels(pseudo, full, k=1)
    ridged = ntkpipe.compare_kernels(
        pseudo, full, k=1, ridge=RIDGE, ridge_scale="mean_diagonal", smallest_eigenvalue=False
    )
    shutil.rmtree(folder)
    names = [
        "relative_difference",
        "scaled_difference",
        "alignment",
        "centred_alignment",
        "largest_eigenvalue_ratio",
        "smallest_eigenvalue_ratio",
        "smallest_eigenvalue_ratio_bounds",
        "condition_number_ratio",
    ]
    row = {"num_parameters": full.manifest.model.num_parameters, "train_accuracy_of_network": accuracy}
    row |= {name: getattr(plain, name) for name in names}
    for suffix, found in (("", plain), ("_ridge", ridged)):
        row[f"prediction_difference{suffix}"] = found.prediction_difference
        row[f"disagreement{suffix}"] = found.disagreement
        row[f"test_accuracy_pntk{suffix}"] = found.test_accuracy_a
        row[f"test_accuracy_ntk{suffix}"] = found.test_accuracy_b
    return row


def _rate(model: Any, inputs: np.ndarray) -> float:
    """A step of gradient descent that is stable and means the same at every width: N over λ_max of the pNTK."""
    kernel = ntkpipe.kernel_matrix(model, inputs, kind="pntk")
    return len(inputs) / float(np.linalg.eigvalsh(kernel.astype(np.float64))[-1])


def _key(row: Row) -> tuple[Any, ...]:
    return row["network"], row["width"], row["seed"], row["state"]


def _in_words(row: Row) -> str:
    case = f"{row['network']} {row['width']:>5}, seed {row['seed']}, {row['state']:<7}"
    ratio = row["condition_number_ratio"]
    kappa = "unknown" if ratio is None else f"{ratio:.3f}"
    return (
        f"{case}  ‖P ⊗ I − Θ‖ / ‖Θ‖ {row['relative_difference']:.4f}  λ_max ratio {row['largest_eigenvalue_ratio']:.3f}"
        f"  κ ratio {kappa}  predictions {row['prediction_difference']:.3f}, "
        f"with ridge {row['prediction_difference_ridge']:.3f}"
    )


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
