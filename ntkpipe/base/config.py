"""Settings: frozen, validated specs of a run, from YAML workflow files or the API; checks of options; budgets."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, SupportsIndex, TypeVar, Union

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from ntkpipe.base.arrays import require_range
from ntkpipe.base.errors import ConfigError, ResourceError
from ntkpipe.base.given import plain_value
from ntkpipe.base.paths import said
from ntkpipe.base.resources import available_memory, exceeded, format_bytes, parse_bytes, process_memory

ComputeDtype = Literal["float32", "float64", "bfloat16", "tf32"]
RealDtype = Literal["float32", "float64"]
RidgeScale = Literal["mean_diagonal"] | None  # unit of a ridge; None is absolute


def _as_int(value: object) -> object:
    """Accept integers of other libraries, such as numpy; leave booleans and text to validation."""
    return value if isinstance(value, bool) or not isinstance(value, SupportsIndex) else operator.index(value)


Positive = Annotated[int, BeforeValidator(_as_int), Field(ge=1, strict=True)]


def _as_location(value: object) -> object:
    """Convert text to a path, but not a URL, which would lose a slash."""
    return Path(value) if isinstance(value, str) and "://" not in value else value


def _as_patterns(value: object) -> object:
    return (value,) if isinstance(value, str) else value


GroupName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]  # becomes a folder of the store
Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_patterns), Field(min_length=1)]


def require_folders(groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Check that names of groups can be folders side by side, on file systems that ignore case, too."""
    seen = {"zarr.json": "zarr.json"}
    for name in groups:
        if seen.setdefault(name.casefold(), name) != name or name == "zarr.json":
            raise ValueError(f"the name {name!r} would share the folder of {seen[name.casefold()]!r}")
    return groups


def _as_bytes(value: object) -> int:
    """The number of bytes that a number or text stands for; raises ValueError."""
    plain = parse_bytes(value) if isinstance(value, str) else plain_value(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not 1 <= plain < 2**63:
        raise ValueError("needed a number of bytes, or text such as 8GiB")
    return int(plain)


Bytes = Annotated[int, BeforeValidator(_as_bytes)]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Checked(ModelMetaclass):  # specs that callers make raise errors of this package, too
    def __call__(cls, **values: Any) -> Any:  # noqa: N805 - of a metaclass
        try:
            return super().__call__(**values)
        except ValidationError as error:
            raise _refusal(error, cls, f"{cls.__name__}()", None) from error


class Spec(BaseModel, metaclass=_Checked):
    """Base of all specs: frozen, without unknown keys."""

    model_config = {"extra": "forbid", "frozen": True}


class FactorySpec(Spec):
    """A callable by its import string ``package.module:name``, which is searched beside the workflow file first."""

    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    arguments: dict[str, Any] = {}


class ModelSpec(FactorySpec):
    """A factory of a ``torch.nn.Module``, with a checkpoint and a forward function, or of an infinite network."""

    # State dict to load, relative to the workflow file: `.safetensors`, or `.pt` / `.pth` (loaded weights-only).
    checkpoint: Path | None = None
    # Selects the (batch, O) tensor: `.attribute` of the output, or import string of a function of it or model, inputs.
    forward: Annotated[str, Field(pattern=r"^(\.\w+(\.\w+)*|[\w.]+:[\w.]+)$")] | None = None


class KernelSpec(Spec):
    """All that determines the numbers of a kernel, apart from model and data."""

    kind: str = "pntk"  # `ntk`, `pntk`, `trace`, `diagonal` or `output:k`; see :mod:`ntkpipe.base.kinds`
    # Shell-style patterns of parameter names; default every parameter that requires a gradient
    parameters: Annotated[tuple[str, ...] | None, BeforeValidator(_as_patterns)] = None
    # Name → shell-style patterns among the selected parameters: a kernel of each group, beside that of all
    groups: Annotated[dict[GroupName, Patterns], AfterValidator(require_folders)] = {}
    # Dtype of the forward pass and the Jacobians; `tf32` is float32 whose products on a GPU may be TF32
    compute_dtype: ComputeDtype = "float32"
    # Dtype of the sum over parameters and of its products, never TF32; default `compute_dtype`, at least float32
    accumulate_dtype: RealDtype | None = None
    store_dtype: RealDtype | None = None  # dtype of the stored matrix; default `accumulate_dtype`
    tile: Positive | None = None  # samples along a tile's edge; default about 2048 rows
    # `structured`, or `fallback` for plain `torch.func`, which is slower, for models that cannot be traced
    jacobian: Literal["structured", "fallback"] = "structured"

    def resolved_accumulate_dtype(self) -> RealDtype:
        """``accumulate_dtype``, or its default."""
        return self.accumulate_dtype or ("float64" if self.compute_dtype == "float64" else "float32")

    def resolved_store_dtype(self) -> RealDtype:
        """``store_dtype``, or its default."""
        return self.store_dtype or self.resolved_accumulate_dtype()


class RunSpec(Spec):
    """Machines and limits of a run. On machines of one type, none of it changes any number."""

    # Bytes that the process may use, Python and torch included; a number or text such as `8GiB`. Default 70 % of what
    # is available. For `scheduler: local` the bytes of all processes together, for an address those of each.
    memory_limit: Annotated[Bytes | None, BeforeValidator(lambda value: getattr(value, "limit", value))] = None
    device: str | None = None  # `cpu`, `cuda` or `cuda:1`; default the first GPU if any
    # Single-threaded workers in this process, or processes for `scheduler: local`; default one per core, on a GPU one.
    # Any other scheduler brings its own workers.
    workers: Positive | None = None
    self_check: bool = True  # compare the engine with plain autograd before the first tile
    force: bool = False  # of a network of infinite width: begin even what is expected to take more than a day
    # Address of a Dask scheduler, such as `tcp://host:8786`, or `local` for single-threaded processes on this machine,
    # one for each GPU if there are any. Default threads of this process.
    scheduler: str | None = None


class ClusterSpec(Spec):
    """A hypothetical cluster, for which ``ntkpipe plan`` estimates time and cost. It does not affect runs.

    Attributes
    ----------
    workers
        Number of workers, each single-threaded on a CPU or with its own GPU.
    device
        Device of the workers, ``"cpu"`` or ``"cuda"``.
    flops_per_second
        Rate of one worker's matrix products in ``accumulate_dtype``; default that of this machine, if it has such a
        device.
    memory_limit
        Bytes of one worker: those of its process, Python and torch included, or those free on its GPU. A number, or
        text such as ``8GiB``; plans use 85 % of it. Default that of a worker on this machine, if it has such a device.
    write_bytes_per_second
        Write rate of the store for all workers together; a number or text such as ``500MB``. By default writing is
        assumed to be faster than computing.
    price
        Price of one worker per hour.
    currency
        Currency of the price, printed as it is.
    """

    workers: Positive
    device: Literal["cpu", "cuda"] = "cpu"
    flops_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    memory_limit: Bytes | None = None
    write_bytes_per_second: Bytes | None = None
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    currency: str = ""


class StepSpec(Spec):
    """A step on the finished store, with its options."""

    step: str
    options: dict[str, Any] = {}


class Workflow(Spec):
    """A whole workflow file."""

    # Path of the store, relative to the working directory, or a URL such as `s3://bucket/prefix/run.zarr`
    store: Annotated[Path | str, BeforeValidator(_as_location)]
    model: ModelSpec
    data: FactorySpec  # of a mapping with `inputs`, optionally `targets`, `test_inputs`, `test_targets`
    kernel: KernelSpec = KernelSpec()
    run: RunSpec = RunSpec()
    steps: tuple[StepSpec, ...] = ()  # run in order once the kernel is complete
    cluster: ClusterSpec | None = None  # estimated by `ntkpipe plan` beside this machine


AnySpec = TypeVar("AnySpec", bound=Spec)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number and a repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            is_plain = isinstance(key, yaml.ScalarNode)
            if not is_plain or key.value in seen:
                problem = f"the key {key.value!r} is repeated" if is_plain else "a key is not plain text"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML reads YAML 1.1, where 1e-6 (no dot) is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_workflow(path: Path, overrides: Sequence[str] = ()) -> Workflow:
    """Read and validate a workflow file."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, _Loader)
        raw = yaml.load(text, _Loader)  # a subclass of SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read the workflow file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the workflow file {path} is not UTF-8 text: {said(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {said(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}; needed a mapping with store, model and data")
    for override in overrides:
        _apply_override(raw, override)
    return parse(Workflow, raw, source=str(path), tree=tree)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r} is not of the form a.b=value")
    try:
        value = yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {said(error)}") from error
    target = raw
    for depth, key in enumerate(keys[:-1], 1):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(keys[:depth])} holds {target!r}, which has no keys")
    target[keys[-1]] = value


def parse(spec: type[AnySpec], values: Mapping[str, Any], *, source: str, tree: yaml.Node | None = None) -> AnySpec:
    """Validate ``values`` as a ``spec``."""
    try:
        return spec.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, spec, source, tree) from error


def _refusal(error: ValidationError, spec: Any, source: str, tree: yaml.Node | None) -> ConfigError:
    return ConfigError("\n".join(_problem(item, spec, source, tree) for item in error.errors()))


def spec_of(spec: type[AnySpec], arguments: Mapping[str, Any]) -> AnySpec:
    """The spec that is made of the arguments of a public function that have the names of its fields."""
    given = {name: value for name, value in arguments.items() if name in spec.model_fields and value is not None}
    return parse(spec, given, source="arguments")


def _problem(item: Any, spec: type[Spec], source: str, tree: yaml.Node | None) -> str:
    location = item["loc"]
    name, line = ".".join(map(str, location)), _line_of(tree, location)
    where = f"{source}, line {line}" if line else source
    if item["type"] == "extra_forbidden":
        known = _known_keys(spec, location[:-1])
        close = get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)[0]
        return f"{where}: unknown key {name!r}; the nearest known key is {close!r} (known: {', '.join(known)})"
    if item["type"] == "missing":
        return f"{where}: {name!r} is missing"
    if item["type"] == "value_error":
        return f"{where}: {name}={item['input']!r}; {item['ctx']['error']}"
    return f"{where}: {name}={item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"


def _known_keys(spec: type[Spec], location: tuple[int | str, ...]) -> list[str]:
    current = spec
    for key in (part for part in location if isinstance(part, str)):
        annotation = current.model_fields[key].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next(c for c in candidates if isinstance(c, type) and issubclass(c, Spec))
    return list(current.model_fields)


def _line_of(node: yaml.Node | None, location: Sequence[int | str]) -> int | None:
    """Line, from 1, of the deepest existing node on the way to ``location``, or None."""
    line = None
    for key in location:
        children: dict[Any, tuple[yaml.Node, yaml.Node]] = {}  # where each begins, and what it is
        if isinstance(node, yaml.MappingNode):
            children = {name.value: (name, value) for name, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            children = {number: (value, value) for number, value in enumerate(node.value)}
        if key not in children:
            break
        begin, node = children[key]
        line = begin.start_mark.line + 1
    return line


def check_number(name: str, value: float, *, low: float, high: float = math.inf) -> float:
    """Return ``value`` as Python's number if ``low <= value <= high``, else raise ConfigError."""
    number: float = plain_value(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not low <= number <= high:
        raise ConfigError(f"{name}={number!r}; needed a number from {low} to {high}")
    return number


def absolute_ridge(ridge: float, scale: RidgeScale, diagonal: Callable[[], NDArray[Any]]) -> float:
    """Convert a ridge to the λ that is added to the diagonal."""
    if scale not in (None, "mean_diagonal"):
        raise ConfigError(f"ridge_scale={scale!r}; needed 'mean_diagonal', or none for an absolute ridge")
    ridge = check_number("ridge", ridge, low=0.0)
    if scale is None:
        return checked_ridge(ridge)
    if (unit := float(diagonal().astype(np.float64).mean())) < 0.0:
        raise ConfigError(f"the mean diagonal, {unit:.3g}, is no unit of ridges; needed a kernel, or absolute ridges")
    return checked_ridge(ridge * unit)


def checked_ridge(ridge: float) -> float:
    """Check what is added to the diagonal."""
    return require_range("ridge", float(check_number("ridge", ridge, low=0.0)))


def absolute_ridges(
    ridges: Sequence[float], scale: RidgeScale, diagonal: Callable[[], NDArray[Any]]
) -> NDArray[np.float64]:
    """Convert ridges to what is added to the diagonal, in their order."""
    if not len(ridges):
        raise ConfigError("no ridge is given; needed at least one")
    return np.array([absolute_ridge(float(ridge), scale, diagonal) for ridge in ridges])


# Of callers: bytes, text such as "8GiB", or what is left of another call's; None for a share of what is free.
MemoryLimit = Union[int, float, str, "Budget", None]

_NOISE_BYTES = 2**24  # of a process beside the arrays that are counted


@dataclass(frozen=True)
class Budget:
    """Bytes that this process may have, everything included; without a limit a share of what is free."""

    limit: int | None = None

    @classmethod
    def of(cls, given: MemoryLimit) -> "Budget":
        """The budget of an argument ``memory_limit``; raises ConfigError for what is no number of bytes."""
        if given is None or isinstance(given, Budget):
            return given or cls()
        try:
            return cls(_as_bytes(given))
        except ValueError as error:
            raise ConfigError(f"memory_limit={given!r}; {error}") from None

    def room(self, share: float = 0.5) -> int:
        """Bytes left, negative if the limit is exceeded; without a limit this share of the available memory."""
        return int(share * available_memory()) if self.limit is None else self.limit - process_memory()

    def fits(self, num_bytes: float, share: float = 0.5) -> bool:
        """Whether so many bytes are left."""
        return num_bytes <= self.room(share)

    def half(self) -> "Budget":
        """What each of two users may have of the room that is left."""
        if self.limit is None or (room := self.room()) <= 0:
            return self
        return Budget(self.limit - room // 2)

    def at_least(self, num_bytes: int) -> "Budget":
        """A budget with room for so many bytes, which are needed in any case: itself, or a larger one."""
        return self if self.limit is None else Budget(max(self.limit, process_memory() + num_bytes + _NOISE_BYTES))

    def require(self, num_bytes: float, what: str, advice: str, share: float = 1.0) -> None:
        """Raise ResourceError with both numbers unless so many bytes are left."""
        if num_bytes > (room := self.room(share)):
            found = f"{what} takes {format_bytes(num_bytes)}, and {format_bytes(max(0, room))} may be used"
            is_full = self.limit is not None and room <= 0
            raise ResourceError(f"{found}; {exceeded(self.limit or 0, process_memory()) if is_full else advice}")
