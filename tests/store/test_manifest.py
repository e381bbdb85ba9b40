"""The manifest survives JSON, notices changes, and says where two runs differ."""

import copy
import json

import pytest

from ntkpipe.base.errors import StoreError
from ntkpipe.store.manifest import ArrayRecord, Manifest, differences, from_attribute


@pytest.fixture
def manifest(make_manifest) -> Manifest:
    return make_manifest()


def test_json_and_back_is_the_same_manifest(manifest):
    attribute = json.loads(json.dumps(manifest.to_attribute()))
    assert from_attribute(attribute, "here") == manifest


def test_the_digest_covers_every_field(manifest):
    def leaves(value, path=()):
        if isinstance(value, dict):
            for key, entry in value.items():
                yield from leaves(entry, (*path, key))
        else:
            yield path

    attribute = manifest.to_attribute()
    for path in leaves(attribute["manifest"]):
        altered = copy.deepcopy(attribute)
        target = altered["manifest"]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = {int: 99, str: "float32", bool: True, list: ["other"]}[type(target[path[-1]])]
        if altered != attribute:
            with pytest.raises(StoreError, match="here"):
                from_attribute(altered, "here")


def test_an_altered_manifest_is_refused(manifest):
    attribute = manifest.to_attribute()
    attribute["manifest"]["tile"] += 1
    with pytest.raises(StoreError, match="does not match its digest; it was altered"):
        from_attribute(attribute, "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tile", "3"),
        ("tile", 0),
        ("tile", 3.0),
        ("kind", None),
        ("store_dtype", "float16"),
        ("model", []),
        ("extra", 1),
    ],
)
def test_wrong_types_are_refused_by_name(manifest, field, value):
    attribute = manifest.to_attribute()
    attribute["manifest"][field] = value
    with pytest.raises(StoreError, match=f"the manifest of here is damaged: bad values in {field}"):
        from_attribute(attribute, "here")


@pytest.mark.parametrize("value", [None, 3, {}, {"manifest": None}, {"manifest": [1]}])
def test_a_group_without_a_manifest_is_refused(value):
    with pytest.raises(StoreError, match="without an ntkpipe manifest"):
        from_attribute(value, "here")


def test_another_format_is_refused_with_both_numbers(manifest):
    attribute = manifest.to_attribute()
    attribute["manifest"]["format"] = 2
    with pytest.raises(StoreError, match="store format 2; this version reads format 1"):
        from_attribute(attribute, "here")


def test_choices_and_environment_are_no_differences(manifest):
    choices = manifest.choices.model_copy(update={"strip": 1, "device": "cuda"})
    other = manifest.model_copy(update={"choices": choices, "environment": {"host": "elsewhere"}})
    assert differences(manifest, other) == ()
    assert other.digest() != manifest.digest()


def test_differences_name_the_field_and_both_values(make_manifest):
    stored, asked = make_manifest(tile=3), make_manifest(tile=4, store_dtype="float32", num_train=9)
    assert differences(stored, asked) == (
        ("tile", 3, 4),
        ("store_dtype", "float64", "float32"),
        ("train.num_samples", 7, 9),
    )


def test_differences_see_a_record_that_only_one_side_has(make_manifest):
    (difference,) = differences(make_manifest(num_test=None), make_manifest())
    assert difference[:2] == ("test", None)


def test_differences_see_an_array_that_only_one_side_has(manifest):
    inputs = {**manifest.train.inputs, "mask": ArrayRecord(shape=(4,), dtype="bool")}
    other = manifest.model_copy(update={"train": manifest.train.model_copy(update={"inputs": inputs})})
    assert [name for name, _, _ in differences(manifest, other)] == ["train.inputs.mask"]
    assert [name for name, _, _ in differences(other, manifest)] == ["train.inputs.mask"]


def test_stores_without_groups_keep_the_manifest_that_they_had(manifest, make_manifest):
    """Fields that came later are not there where they say nothing, and so not in the digest."""
    assert not {"groups", "derived"} & manifest.to_attribute()["manifest"].keys()
    grouped = manifest.model_copy(update={"groups": {"head": ("b",), "all": ("a",)}})
    assert from_attribute(json.loads(json.dumps(grouped.to_attribute())), "here") == grouped
    assert grouped.digest() != manifest.digest()
    assert differences(manifest, grouped) == (("groups.head", None, ("b",)), ("groups.all", None, ("a",)))


@pytest.mark.parametrize("name", ["../head", "a/b", "", ".", "zarr.json"])
def test_a_group_of_a_hostile_manifest_is_no_path(manifest, name):
    altered = manifest.model_copy(update={"groups": {name: ("a",)}})
    with pytest.raises(StoreError, match="damaged: bad values in groups"):
        from_attribute(altered.to_attribute(), "here")
