"""An opened store: its kernels, outputs, targets and progress. Imports neither torch nor dask."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ntkpipe.base.arguments import checked
from ntkpipe.base.errors import ConfigError, StoreError, needed_for
from ntkpipe.base.kinds import array_of, get_kind, prefix_of
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows, as_table
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.kernel import Kernel, require_memory
from ntkpipe.store.results import reading_results
from ntkpipe.store.store import Store
from ntkpipe.store.verification import count_findings

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class BuildProgress:
    """How much of a store is complete."""

    tiles_done: int  # tiles that exist, of all kernels
    tiles_total: int  # tiles of all kernels
    bytes_done: int  # bytes of the tiles that exist

    @property
    def is_complete(self) -> bool:
        """Whether every tile exists."""
        return self.tiles_done == self.tiles_total


class KernelSet:
    """The kernels that sum over the same parameters, all selected ones or a group; optionally those of one output."""

    def __init__(self, store: Store, group: str | None = None, output: int | None = None) -> None:
        self.store, self.path, self.manifest = store, store.root, store.manifest
        self._group, self._output = group, output

    def __repr__(self) -> str:
        return f"<KernelSet {prefix_of(self._group, self._output)} of {self.store.root}>"

    @property
    def train(self) -> Kernel:
        """Train x train, symmetric, shape (N*S, N*S)."""
        return self._as_kernel(self._plane("kernel/train"))

    @property
    def test_train(self) -> Kernel:
        """Test x train, shape (M*S, N*S); raises as :attr:`train`."""
        return self._as_kernel(self._plane("kernel/test_train"))

    @property
    def test_diagonal(self) -> NDArray[Any]:
        """S x S block of each test sample with itself, shape (M, S, S); raises as :attr:`train`."""
        return _read_all(self._plane("kernel/test_diagonal"))

    def to_xarray(self) -> "xarray.Dataset":
        """Return kernels, outputs and targets as a lazy :class:`xarray.Dataset`; creating it reads no tile.

        ======================  ============================================  ==================================
        variable                dimensions                                    there if
        ======================  ============================================  ==================================
        ``train``               ``(sample, sample_)``
        ``test_train``          ``(test_sample, sample_)``                    the store has test samples
        ``test_diagonal``       ``(test_sample,)``                            the store has test samples
        ``outputs``             ``(sample, output)``
        ``test_outputs``        ``(test_sample, output)``                     the store has test samples
        ``target``              ``(sample,)`` and those of a target           coordinate; the store has targets
        ``target_``             ``(sample_,)`` and those of a target          coordinate; the store has targets
        ``test_target``         ``(test_sample,)`` and those of a target      coordinate; the store has test targets
        ======================  ============================================  ==================================

        A trailing underscore marks column dimensions, in train and test kernels alike, so that
        ``xarray.dot(dataset.test_train, coefficients)`` with coefficients of ``(sample_, …)`` is a prediction. A full
        NTK has the dimensions ``(sample, output, sample_, output_)``. A store of kind ``diagonal``, with a kernel for
        each output, has ``(output, sample, sample_)``, unless :meth:`output` has picked one. Targets with as many
        columns as there are outputs have the dimension ``output``, others ``target_axis_1`` and so on.

        Attributes are ``kind``, ``convention``, ``compute_dtype``, ``accumulate_dtype``, ``store_dtype``, ``model``,
        ``num_parameters`` and ``manifest_digest`` of the manifest, and ``group`` and ``picked_output`` if chosen.
        Entries keep the dtype of the store: convert with ``.astype("float64")`` before long sums.
        """
        with needed_for("to_xarray", "xarray"):
            from ntkpipe.store.views import to_xarray as labelled
        return labelled.to_dataset(self.store, self._as_kernel, self._group, self._output)

    def output(self, number: int) -> "KernelSet":
        """Select the kernels of one output, in a store of kind ``diagonal``."""
        if get_kind(self.manifest.kind).pairs != "same" or self._output is not None:
            raise ConfigError(f"{self!r} has no kernels of single outputs; they are those of kind='diagonal'")
        if not 0 <= number < self.manifest.num_outputs:
            raise ConfigError(f"output({number}): {self.path} has outputs 0 to {self.manifest.num_outputs - 1}")
        return KernelSet(self.store, self._group, number)

    def _as_kernel(self, array: StoredArray) -> Kernel:
        return Kernel(array, self.manifest.digest())

    def _plane(self, name: str) -> StoredArray:
        """The array of this group and output that corresponds to ``name``."""
        if self._output is None and get_kind(self.manifest.kind).pairs == "same":
            raise ConfigError(
                f"{self.path} has a kernel for each of {self.manifest.num_outputs} outputs; use "
                f".output(k).{name.rpartition('/')[2]}"
            )
        return self._array(array_of(prefix_of(self._group, self._output), name))

    def _array(self, name: str) -> StoredArray:
        if name not in self.store.arrays:
            raise StoreError(f"{self.path} has no {name}: it was made without test_inputs")
        return self.store.arrays[name]


class KernelStore(KernelSet):
    """A kernel store, opened for reading.

    Attributes
    ----------
    path
        Path or URL of the store.
    manifest
        Everything that decided the numbers.
    store
        The arrays underneath.
    """

    def __repr__(self) -> str:
        manifest, progress = self.manifest, self.progress
        return (
            f"<KernelStore {self.path} kind={manifest.kind} {manifest.train.num_samples} samples, "
            f"{manifest.num_outputs} outputs, {progress.tiles_done}/{progress.tiles_total} tiles>"
        )

    def __str__(self) -> str:
        return as_table(self.rows())

    def rows(self) -> TableRows:
        """What the store holds, how far it is and what was found, as (quantity, value) in words; reads no tile."""
        progress = self.progress
        done = f"{progress.tiles_done:,} of {progress.tiles_total:,}, {format_bytes(progress.bytes_done)}"
        with reading_results(self.path):
            return [*self.manifest.rows(), ("tiles", done), *_result_rows(self.store)]

    @property
    def progress(self) -> BuildProgress:
        """How much is complete, from one listing; no tile is read."""
        arrays = [array for array in self.store.arrays.values() if array.layout.grid is not None]
        done = [array.layout.num_chunks - len(array.missing()) for array in arrays]
        num_bytes = sum(count * array.layout.chunk_bytes for count, array in zip(done, arrays, strict=True))
        return BuildProgress(sum(done), sum(array.layout.num_chunks for array in arrays), num_bytes)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Name → parameters of each group with kernels of its own."""
        return dict(self.manifest.groups)

    def group(self, name: str) -> KernelSet:
        """Select the kernels of one group of parameters."""
        if name not in self.manifest.groups:
            known = ", ".join(map(repr, self.manifest.groups)) or "none"
            raise ConfigError(f"{self.path} has no group {name!r}; it has {known}")
        return KernelSet(self.store, name)

    @property
    def outputs(self) -> NDArray[Any]:
        """The model's outputs on the train samples, shape (N, O)."""
        return _read_all(self._array("outputs/train"))

    @property
    def test_outputs(self) -> NDArray[Any]:
        """The model's outputs on the test samples, shape (M, O)."""
        return _read_all(self._array("outputs/test"))

    @property
    def targets(self) -> NDArray[Any] | None:
        """Train targets, first axis N, or None if the store was made without."""
        array = self.store.arrays.get("targets/train")
        return None if array is None else _read_all(array)

    @property
    def test_targets(self) -> NDArray[Any] | None:
        """Test targets, first axis M, or None if the store was made without."""
        array = self.store.arrays.get("targets/test")
        return None if array is None else _read_all(array)


def _read_all(array: StoredArray) -> NDArray[Any]:
    require_memory(array.layout.shape, array.layout.dtype, array.layout.name)
    return array.read_samples(0, array.layout.shape[0]).astype(array.layout.dtype)


def _result_rows(store: Store) -> TableRows:
    rows = [("verified", "never")]
    if (report := store.read_result("verification")) is not None:
        verdict = "good" if report["is_good"] else count_findings(report["num_findings"])
        rows = [("verified", f"{verdict}; {report['chunks_checked']} chunks, {report['checked']}")]
    if (certificate := store.read_result("certificate")) is not None:
        errors = ", ".join(f"{found['array']} to {found['error']:.1e}" for found in certificate["kernels"])
        rows.append(("certified", f"{errors}, {certificate['checked']}"))
    for run in store.read_results("runs")[-1:]:
        halved = "" if run["batch_used"] == run["batch"] else f"; memory ran out, batches of {run['batch_used']}"
        rate = f"{run['flops'] / run['seconds'] / 1e9:.1f} GFLOP/s, {run['share_of_rate']:.0%} of matrix products"
        rows.append(("last run", f"{run['tiles']} tiles on {', '.join(run['hosts'])}: {rate}{halved}"))
    for name, found in store.solver_results().items():
        rows.append((name, f"{found['status']}, {found['work']['passes']:.4g} passes, {found['seconds']:.3g} s"))
    if (driver := store.read_result("driver")) is not None:
        rows.append(("driver", f"{driver['state']} on {driver['host']}, {driver['time']} {driver['message']}"))
    return rows


@checked
def open_kernel(path: str | Path | KernelStore) -> KernelStore:
    """Open a kernel store for reading, by path or URL; loads neither torch nor dask, and reads only the manifest.

    An open store is returned as it is.

    Raises
    ------
    StoreNotFoundError
        If there is nothing at the path.
    StoreError
        If what is there is not a kernel store, or its manifest is damaged.
    """
    return path if isinstance(path, KernelStore) else KernelStore(Store.open(path))
