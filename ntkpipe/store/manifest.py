"""The manifest: all that determines the numbers of a store, as JSON in its group's attributes."""

import hashlib
import json
from itertools import zip_longest
from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    JsonValue,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ntkpipe.base.config import ComputeDtype, GroupName, RealDtype, require_folders
from ntkpipe.base.errors import StoreError
from ntkpipe.base.kinds import num_planes
from ntkpipe.base.tables import TableRows, as_table

FORMAT: Literal[1] = 1
ATTRIBUTE = "ntkpipe"

_MOST_AXES = 63  # numpy supports 64, and one is the sample axis
_MOST_SHOWN = 1000  # characters of a network
_LARGEST = 2**53  # other JSON readers parse numbers as float64


class _Record(BaseModel):
    model_config = {"extra": "forbid", "frozen": True, "strict": True}


class ArrayRecord(_Record):
    """Shape per sample, and dtype, of one array."""

    shape: Annotated[tuple[PositiveInt, ...], Field(max_length=_MOST_AXES)]
    # Plain numbers; no objects, dates or structures
    dtype: Annotated[str, Field(pattern=r"^(bool|u?int(8|16|32|64)|float(16|32|64))$")]


def _require_identifier(name: str) -> str:
    """Check a name that becomes a keyword argument of the model and a folder of the store."""
    if not name.isidentifier():
        raise ValueError("not a name of an array")
    return name


class DataRecord(_Record):
    """One set of samples."""

    num_samples: PositiveInt
    # Arrays of a sample by name; a sample that is a single tensor has the array `input`.
    inputs: dict[Annotated[str, AfterValidator(_require_identifier)], ArrayRecord]
    is_mapping: bool  # whether the model takes a dict of arrays, or a single array
    inputs_digest: str  # sha256 over names, dtypes, shapes and bytes, as targets_digest
    targets: ArrayRecord | None
    targets_digest: str | None


class ModelRecord(_Record):
    """The model."""

    name: str  # its class, or the import string and arguments it was made from
    state_digest: str  # sha256 over names, dtypes, shapes and bytes of parameters and buffers, in the dtypes given
    structure_digest: str  # sha256 over the printed module tree: activation functions have no state
    parameters: tuple[str, ...]  # names of the selected parameters
    num_parameters: PositiveInt  # number of scalars in them


class SourceRecord(_Record):
    """What takes the place of a model: a formula."""

    name: Literal["infinite"]  # of a network of infinite width; see :mod:`ntkpipe.infinite`
    network: dict[str, JsonValue]  # all options that decide numbers, `name` among them
    formulas: Literal[1]  # version of the formulas; another one has other bits


class Choices(_Record):
    """Free choices that determine the last bits; made once, and reused by every resume."""

    strip: PositiveInt  # samples whose Jacobians are computed and held together
    subtile: PositiveInt  # samples along the edge of the pieces into which contractions of strips are cut
    batch: PositiveInt  # samples of one forward pass
    representations: dict[str, str]  # how the Jacobian of each parameter (or fused pair) is represented
    device: str  # device type
    # Instruction set or name of the GPU, and version of torch; results of different ones agree up to rounding.
    arithmetic: str


class DerivedRecord(_Record):
    """Source of a store that was derived from another one, without the model."""

    kind: str  # kind of the source
    digest: str  # digest of the manifest of the source
    has_samples: bool  # whether the samples were copied, too


class GrowthRecord(_Record):
    """Samples of a store before a growth; bits of tiles at the old edge depend on them."""

    train: DataRecord
    test: DataRecord | None
    environment: dict[str, str]  # versions, host and time of the run that added samples; informative, never compared


# Fields that are left out of the JSON if empty; later ones, so that older stores keep their manifest and digest.
_LATER = frozenset({"model", "groups", "derived", "growth", "source"})


class Manifest(_Record):
    """Content of a store. Frozen; its digest is stored beside it, so that alterations are noticed."""

    format: Literal[1]
    kind: str
    convention: str
    num_outputs: PositiveInt
    num_covectors: PositiveInt
    tile: PositiveInt
    compute_dtype: ComputeDtype
    accumulate_dtype: RealDtype
    store_dtype: RealDtype
    model: ModelRecord | None = None  # of a formula none, but `source`
    train: DataRecord
    test: DataRecord | None
    choices: Choices
    # Versions, host and time of the run that created the store; informative, never compared
    environment: dict[str, str]
    # Name → parameters of each group with kernels of its own; groups are disjoint
    groups: Annotated[dict[GroupName, tuple[str, ...]], AfterValidator(require_folders)] = {}
    derived: DerivedRecord | None = None  # the source of a derived store
    growth: tuple[GrowthRecord, ...] = ()  # samples before each growth, the oldest first; never compared
    source: SourceRecord | None = None  # the formula, in place of a model

    @model_validator(mode="after")
    def _has_one_maker(self) -> "Manifest":
        if (self.model is None) == (self.source is None):
            raise ValueError("needed either a model or a source")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if value or name not in _LATER}

    def earlier(self) -> tuple["Manifest", ...]:
        """The manifests before each growth, the oldest first."""
        return tuple(
            self.model_copy(update={"train": before.train, "test": before.test, "growth": self.growth[:number]})
            for number, before in enumerate(self.growth)
        )

    def grown(self, train: DataRecord, test: DataRecord | None, environment: dict[str, str]) -> "Manifest":
        """The manifest after a growth."""
        before = GrowthRecord(train=self.train, test=self.test, environment=environment)
        return self.model_copy(update={"train": train, "test": test, "growth": (*self.growth, before)})

    @property
    def maker(self) -> str:
        """The model, or the formula in its place, in words."""
        if self.model is not None:
            return f"{self.model.name}, {self.model.num_parameters:,} parameters"
        layers = None if self.source is None else self.source.network.get("layers")
        return f"{len(layers) if isinstance(layers, list) else 'some'} layers of infinite width"

    @property
    def shape(self) -> str:
        """Shape of the train kernels, and how many there are, in words."""
        rows = self.train.num_samples * self.num_covectors
        count = num_planes(self.kind, self.num_outputs, len(self.groups))
        return f"{rows:,} × {rows:,}" if count == 1 else f"{count} of {rows:,} × {rows:,}"

    def rows(self) -> TableRows:
        """The manifest as (quantity, value) in words."""
        rows = [
            ("kind", f"{self.kind}: {self.convention}"),
            ("kernel", f"{self.shape} {self.store_dtype}"),
            ("samples", f"{_num_samples(self)}; {self.num_outputs} outputs"),
            ("model", self.maker + ("" if self.model is None else f" in {len(self.model.parameters)}")),
            ("computed in", f"{self.compute_dtype}, summed in {self.accumulate_dtype}, on {self.choices.device}"),
            ("made", ", ".join(f"{name} {value}" for name, value in self.environment.items())),
        ]
        if self.source is not None:
            rows.append(("network", shorten(json.dumps(self.source.network), _MOST_SHOWN, placeholder=" …")))
        elif self.groups and self.model is not None:
            sizes = [f"{name} ({len(parameters)})" for name, parameters in self.groups.items()]
            left = len(self.model.parameters) - sum(map(len, self.groups.values()))
            rows.append(("groups", ", ".join(sizes) + (f"; {left} parameters in none" if left else "")))
        if self.derived is not None:
            rows.append(("derived", f"from kind {self.derived.kind}, manifest {self.derived.digest[:12]}"))
        for before in self.growth:
            when = before.environment.get("created", "at an unknown time")
            rows.append(("grown from", f"{_num_samples(before)} samples, {when}"))
        return rows

    def __str__(self) -> str:
        return as_table(self.rows())

    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_attribute(self) -> dict[str, Any]:
        """JSON value of the group attribute."""
        return {"manifest": self.model_dump(mode="json"), "digest": self.digest()}


def _num_samples(held: Manifest | GrowthRecord) -> str:
    return f"{held.train.num_samples:,} train, {held.test.num_samples if held.test else 0:,} test"


def from_attribute(value: object, where: str) -> Manifest:
    """Read a manifest from a group attribute."""
    if not isinstance(value, dict) or not isinstance(value.get("manifest"), dict):
        raise StoreError(
            f"{where} is a Zarr group without an ntkpipe manifest; needed a kernel store, or a new path for one"
        )
    found = value["manifest"].get("format")
    if found != FORMAT:
        raise StoreError(f"{where} has store format {repr(found)[:20]}; this version reads format {FORMAT}")
    try:
        problem = _implausible(value["manifest"])
    except RecursionError:
        problem = "it is nested too deeply"
    if problem is not None:
        raise StoreError(f"the manifest of {where} is damaged: {problem}")
    try:
        # Through JSON: strict validation accepts lists for tuples only there.
        manifest = Manifest.model_validate_json(json.dumps(value["manifest"]))
    except ValidationError as error:
        places = [".".join(map(str, item["loc"])) for item in error.errors(include_url=False, include_input=False)]
        shown = ", ".join(place[:100] for place in places[:8])
        more = f" and {len(places) - 8} more" if len(places) > 8 else ""
        raise StoreError(f"the manifest of {where} is damaged: bad values in {shown}{more}") from error
    if manifest.digest() != value.get("digest"):
        raise StoreError(f"the manifest of {where} does not match its digest; it was altered after it was written")
    return manifest


def _implausible(value: object) -> str | None:
    """Find control characters or huge numbers, since untrusted texts get printed and numbers become shapes."""
    if isinstance(value, str) and any(not (c.isprintable() or c in "\n\t") for c in value):
        return f"control characters in {value[:40]!a}"
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"a number of {value.bit_length()} bits"
    parts: list[object] = [*value, *value.values()] if isinstance(value, dict) else []
    parts += value if isinstance(value, list) else []
    return next((problem for part in parts if (problem := _implausible(part)) is not None), None)


# Runs of the same kernel may differ in choices, environment and history, but in nothing else.
_SETTINGS = ("kind", "convention", "num_outputs", "tile", "compute_dtype", "accumulate_dtype", "store_dtype")
_IDENTITY = (*_SETTINGS, "model", "source", "groups", "train", "test")


def differences(stored: Manifest, asked: Manifest) -> tuple[tuple[str, object, object], ...]:
    """Fields in which two kernels differ, as ``(field, stored, asked)`` with records expanded."""
    left, right = ({name: getattr(manifest, name) for name in _IDENTITY} for manifest in (stored, asked))
    return tuple(_compare("", left, right))


def _compare(prefix: str, left: object, right: object) -> list[tuple[str, object, object]]:
    left = left.model_dump() if isinstance(left, BaseModel) else left
    right = right.model_dump() if isinstance(right, BaseModel) else right
    if isinstance(left, dict) and isinstance(right, dict):
        keys = {key: f"{prefix}.{key}" if prefix else key for key in [*left, *right]}
        return [item for key, name in keys.items() for item in _compare(name, left.get(key), right.get(key))]
    if isinstance(left, list) and isinstance(right, list):  # of a network's options
        pairs = enumerate(zip_longest(left, right))
        return [item for at, pair in pairs for item in _compare(f"{prefix}.{at}", *pair)]
    return [] if left == right else [(prefix, left, right)]
