"""The two kernels of a comparison with their samples, targets and test kernels, and whether they can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ntkpipe.analysis.comparing.entries import Entries, OperatorEntries, TileEntries
from ntkpipe.base.config import Budget, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.kinds import INFINITE
from ntkpipe.base.operator import Operator
from ntkpipe.operators.opening import as_operator, matrix_of, open_for_solver
from ntkpipe.operators.tiles import tiles_of
from ntkpipe.store.export import find_kernel
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet, KernelStore, open_kernel
from ntkpipe.store.manifest import DataRecord, Manifest, differences

if TYPE_CHECKING:
    from distributed import Client

_TRAIN, _TEST = "train", "test_train"


@dataclass(frozen=True)
class KernelInput:
    """One of two kernels that are compared."""

    name: str  # for people: path and array, or what it is
    matrix: Any  # a stored kernel, an array, or an operator
    width: int  # rows a sample in the matrix
    num_samples: int  # of the train kernel
    store: KernelStore | None = None  # where a stored kernel is
    test_kernel: Any = None  # test × train, if there is one: a stored kernel or an array

    @property
    def manifest(self) -> Manifest | None:
        """Manifest of a stored kernel."""
        return None if self.store is None else self.store.manifest

    @property
    def kind(self) -> str | None:
        """Kind of a stored kernel."""
        return None if self.manifest is None else self.manifest.kind

    @property
    def identity(self) -> str:
        """Identity of the matrix, by its entries or what is stored."""
        return self.matrix.identity if isinstance(self.matrix, Kernel) else as_operator(self.matrix).identity()

    def entries(self) -> Entries:
        """The entries, by tiles where there are some."""
        if (source := tiles_of(self.matrix, self.width)) is None:
            return OperatorEntries(as_operator(self.matrix), self.width)
        return TileEntries(source, self.width)

    @contextmanager
    def operator(self, budget: Budget, client: "Client | None") -> Iterator[Operator]:
        """The kernel as an operator, closed afterwards unless it was one before."""
        if client is None:
            operator, _ = open_for_solver(self.matrix, budget)
        else:
            operator = as_operator(self.matrix, memory_limit=budget, client=client)
        try:
            yield operator
        finally:
            if operator is not self.matrix:
                operator.close()


def inputs_of(
    a: Any, b: Any, *, array: str = _TRAIN, num_outputs: int | None = None, test_kernels: tuple[Any, Any] | None = None
) -> tuple[KernelInput, KernelInput]:
    """The two kernels of a comparison, from stores, paths, stored kernels, arrays or operators."""
    found = [_stored_input(kernel, array) or _input_of_matrix(kernel, name) for name, kernel in (("a", a), ("b", b))]
    rows = [one.num_samples * one.width for one in found]
    full = max(one.width for one in found)
    if num_outputs is not None:
        full = int(check_number("num_outputs", num_outputs, low=1))
    for place, (one, own) in enumerate(zip(found, rows, strict=True)):
        if one.store is None and own == max(rows):
            if own % full:
                has = f"{'ab'[place]} has {own} rows, which is no multiple of {full} outputs"
                raise ConfigError(f"{has}; needed sample * O + output")
            found[place] = replace(one, width=full, num_samples=own // full)
        if test_kernels is not None:
            found[place] = replace(found[place], test_kernel=test_kernels[place])
    return found[0], found[1]


def _input_of_matrix(kernel: Any, name: str) -> KernelInput:
    """A matrix that is not known to have more than one row a sample."""
    matrix = matrix_of(kernel, name)
    count = int(matrix.shape[0])
    return KernelInput(f"{name} ({count} × {count})", matrix, 1, count)


def _stored_input(kernel: Any, array: str) -> KernelInput | None:
    if isinstance(kernel, str | Path):
        kernel = open_kernel(kernel)
    if isinstance(kernel, KernelStore):
        return _input_of_store(kernel, array)
    if isinstance(kernel, KernelSet):
        kernel = kernel.train
    return _input_of_store(open_kernel(kernel.root), kernel.name) if isinstance(kernel, Kernel) else None


def _input_of_store(store: KernelStore, array: str) -> KernelInput:
    kernel, manifest = find_kernel(store, array), store.manifest
    test = f"{kernel.name.removesuffix(_TRAIN)}{_TEST}"
    test_kernel = Kernel(store.store.arrays[test], manifest.digest()) if test in store.store.arrays else None
    name = f"{store.path}" if kernel.name == f"kernel/{_TRAIN}" else f"{store.path} {kernel.name}"
    count = manifest.train.num_samples
    return KernelInput(name, kernel, manifest.num_covectors, count, store, test_kernel)


def require_comparable(a: KernelInput, b: KernelInput) -> int:
    """Rows a sample that both are compared in: that of a full NTK, O, if one of them is."""
    if a.manifest is not None and b.manifest is not None:
        differing = _data_differences("train", a.manifest.train, b.manifest.train)
        # Those of infinite width stand for any number of outputs.
        if max(a.width, b.width) > 1 and INFINITE.name not in {a.kind, b.kind}:
            one, other = a.manifest.num_outputs, b.manifest.num_outputs
            differing += [("num_outputs", one, other)] if one != other else []
        if differing:
            shown = "; ".join(f"{field} is {one} in a and {other} in b" for field, one, other in differing)
            raise ConfigError(
                f"{a.name} and {b.name} are not kernels of the same samples: {shown}. Needed two kernels of the same "
                "inputs in the same order, shape and dtype"
            )
    if a.num_samples != b.num_samples or (a.width != b.width and 1 not in {a.width, b.width}):
        raise ConfigError(
            f"{a.name} has {a.num_samples} samples of {a.width} rows and {b.name} {b.num_samples} of {b.width}; needed "
            "the same samples. An array of a full NTK, row = sample * O + output, needs num_outputs=O beside a kernel "
            "of one row a sample"
        )
    return max(a.width, b.width)


def differing_fields(a: KernelInput, b: KernelInput) -> tuple[str, ...] | None:
    """Fields of the manifests that differ, but for tiles; none where one has no manifest."""
    if a.manifest is None or b.manifest is None:
        return None
    return tuple(field for field, _, _ in differences(a.manifest, b.manifest) if field != "tile")


def has_same_test_samples(a: KernelInput, b: KernelInput) -> bool:
    """Whether test kernels are of the same samples, as far as manifests say."""
    if a.manifest is None or b.manifest is None:
        return True
    one, other = a.manifest.test, b.manifest.test
    return one is not None and other is not None and not _data_differences("test", one, other)


def _data_differences(split: str, one: DataRecord, other: DataRecord) -> list[tuple[str, object, object]]:
    fields = ("num_samples", "inputs_digest", "targets_digest")
    found = [(f"{split}.{field}", getattr(one, field), getattr(other, field)) for field in fields]
    # Targets that only one of the stores has are no contradiction.
    return [(field, _short(a), _short(b)) for field, a, b in found if a != b and None not in (a, b)]


def _short(value: object) -> object:
    return f"{value[:12]}…" if isinstance(value, str) else value


def targets_of(a: KernelInput, b: KernelInput, split: str) -> NDArray[Any] | None:
    """Targets of the first of the stores that has them; ``split`` is ``train`` or ``test``."""
    stores = [one.store for one in (a, b) if one.store is not None]
    found = (store.targets if split == "train" else store.test_targets for store in stores)
    return next((targets for targets in found if targets is not None), None)
