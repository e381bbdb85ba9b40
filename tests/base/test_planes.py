"""Planes: kernels of single outputs and of groups, filled by one pass, each an ordinary kernel of the store."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from architectures import IDS
from engines import engine_of, forced, take
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Custom, redraw
from small import Allowance, chunks, inputs, mlp, times
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ntkpipe
from ntkpipe.base.errors import ConfigError, StoreError, StoreFullError, StoreMismatchError
from ntkpipe.base.kinds import MAX_PLANES, match_groups, num_planes, planes_of
from ntkpipe.jacobian.cost import Meter
from ntkpipe.jacobian.model.device import exact_math
from ntkpipe.jacobian.representations.pieces import contract_diagonal_planes, contract_planes
from ntkpipe.jacobian.representations.sums import Workspace
from ntkpipe.store.kernel_store import KernelSet, KernelStore
from ntkpipe.store.layout import layouts

L = nn.Linear
X = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
TEST = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
KINDS = ("ntk", "pntk", "trace", "output:1", "diagonal")


def normed():
    """A weight norm, whose two parameters are joined; a layer norm; biases apart from their weights."""
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(L(6, 5), nn.Tanh(), weight_norm(L(5, 4)), nn.Tanh(), nn.LayerNorm(4), L(4, 3))


def language():
    """A table, a tied head, positions, and a parameter without a rule."""
    return Custom(
        lambda m, x: torch.logaddexp((torch.tanh(m.a(m.e(x) + m.p)) @ m.e.weight[:3].T).mean(1), m.o),
        e=nn.Embedding(20, 4),
        p=nn.Parameter(torch.zeros(4, 4)),
        a=L(4, 4),
        o=nn.Parameter(torch.zeros(3)),
    )


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.GELU(), nn.Conv1d(4, 3, 2), nn.Flatten(), L(3, 3)
    )


# Model, samples, groups: some cover everything, some split a weight from its bias, or what is joined.
CASES = {
    "all": (mlp, X[:, :4], {"all": "*"}),
    "weights and biases": (mlp, X[:, :4], {"weights": "*.weight", "biases": ["0.bias", "2.bias"]}),
    "part": (mlp, X[:, :4], {"head": "2.*"}),
    "joined": (
        normed,
        X,
        {"g": "*original0", "v": ["*original1", "4.weight"], "biases": "[05].bias", "in": "0.weight"},
    ),
    "joined, one group": (normed, X, {"norm": "2.*", "head": "5.*"}),
    "language": (language, torch.cat([IDS, IDS.flip(1)])[:11], {"table": "e.*", "rest": ["p", "o"], "bias": "a.bias"}),
    "convolution": (convolutional, X, {"first": "1.*", "biases": ["3.bias", "5.bias"]}),
}


def reduced(kernel, size, kind):
    """The matrices of a kind, by output, from the full kernel."""
    blocks = kernel.reshape(size, 3, size, 3)
    if kind == "diagonal":
        return {output: blocks[:, output, :, output] for output in range(3)}
    return {
        None: {
            "ntk": kernel,
            "pntk": blocks.sum((1, 3)) / 3,
            "trace": np.einsum("iojo->ij", blocks) / 3,
            "output:1": blocks[:, 1, :, 1],
        }[kind]
    }


def members_of(groups, names):
    return match_groups({group: (p,) if isinstance(p, str) else p for group, p in groups.items()}, names)


def every_plane(grams, groups, size, kind):
    """``(group, output)`` → kernel by brute force; of all parameters without a group."""
    members = {
        None: tuple(grams),
        **members_of(groups, list(grams)),
    }
    return {
        (group, output): exact
        for group, names in members.items()
        for output, exact in reduced(sum(grams[name] for name in names), size, kind).items()
    }


def pick(store: KernelStore, group, output) -> KernelSet:
    kernels = store if group is None else store.group(group)
    return kernels if output is None else kernels.output(output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_every_plane_of_a_store_is_the_brute_force(name, kind, tmp_path):
    make, samples, groups = CASES[name]
    model = redraw(make())
    test = torch.cos(samples[:4]) if samples.is_floating_point() else samples[:4].flip(1)
    both, size, cut = torch.cat([samples, test]), len(samples) + 4, len(samples)
    store = ntkpipe.compute_kernel(
        model,
        samples,
        test_inputs=test,
        store=tmp_path / "s",
        kind=kind,
        groups=groups,
        compute_dtype="float64",
        tile=4,
        workers=1,
        progress=False,
        self_check=False,
    )
    exact = every_plane(reference.grams(reference.jacobians(model, both)), groups, size, kind)
    for (group, output), kernel in exact.items():
        found, width = pick(store, group, output), len(kernel) // size
        rows = cut * width
        scale = reference.scale(kernel) + 1e-4 * reference.scale(exact[None, output])  # a group may be zero
        assert np.abs((found.train - kernel[:rows, :rows]) / scale[:rows, :rows]).max() <= 1e-12
        assert np.abs((found.test_train - kernel[rows:, :rows]) / scale[rows:, :rows]).max() <= 1e-12
        blocks = kernel[rows:, rows:].reshape(4, width, 4, width)
        blocks = np.stack([blocks[i, :, i] for i in range(4)])
        assert np.abs(found.test_diagonal - blocks).max() <= 1e-12 * scale.max()
        assert np.array_equal(found.train, found.train[:].T)
    layouts = [array.layout for array in store.store.arrays.values()]
    assert sum(layout.grid is not None or layout.holds_blocks for layout in layouts) == 3 * len(exact)
    assert store.progress.is_complete


@pytest.mark.parametrize("pairs", ["all", "same", "sum"])
@pytest.mark.parametrize("name", ["joined", "language", "convolution"])
def test_groups_are_exact_however_their_jacobians_are_held(name, pairs):
    make, samples, groups = CASES[name]
    model = redraw(make())
    grams = reference.grams(reference.jacobians(model, samples))
    plain = engine_of(model, samples, torch.eye(3, dtype=torch.float64))
    members = members_of(groups, plain.model.names)
    kind = {"all": "ntk", "same": "diagonal", "sum": "trace"}[pairs]
    factor = 3 if pairs == "sum" else 1  # covectors are not scaled here
    exact = [kernel * factor for kernel in every_plane(grams, groups, 11, kind).values()]
    for engine in forced(plain).values():
        grouped = engine.changed(setup=replace(engine.setup, groups=tuple(members.values()), pairs=pairs))
        with exact_math():
            pieces = [grouped.piece(take(samples, range(*part)))[0] for part in ((0, 6), (6, 11))]
            rows = [np.cumsum([0, *(piece.num_samples for piece in pieces)]) * (3 if pairs == "all" else 1)][0]
            found = [torch.full(kernel.shape, torch.nan, dtype=torch.float64) for kernel in exact]
            for i, left in enumerate(pieces):
                for j, right in enumerate(pieces):
                    outs = [out[rows[i] : rows[i + 1], rows[j] : rows[j + 1]] for out in found]
                    contract_planes(left, right, Workspace(), pairs, outs)
            diagonals = [contract_diagonal_planes(piece, pairs, len(exact)) for piece in pieces]
        for number, kernel in enumerate(exact):
            scale = reference.scale(kernel) + 1e-4 * reference.scale(exact[number % (3 if pairs == "same" else 1)])
            assert np.abs((found[number].numpy() - kernel) / scale).max() <= 1e-12
            width = 3 if pairs == "all" else 1
            blocks = kernel.reshape(11, width, 11, width)
            wanted = np.stack([blocks[i, :, i] for i in range(11)])
            assert np.abs(torch.cat([each[number] for each in diagonals]).numpy() - wanted).max() <= 1e-12 * scale.max()


@settings(deadline=None, max_examples=8)
@given(
    num_samples=st.integers(2, 9),
    num_outputs=st.integers(1, 4),
    tile=st.integers(1, 9),
    kind=st.sampled_from(["ntk", "trace", "diagonal"]),
    owners=st.lists(st.sampled_from(["a", "b", ""]), min_size=4, max_size=4),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_groups_sum_to_the_whole_whatever_the_sizes(num_samples, num_outputs, tile, kind, owners, dtype):
    model = redraw(nn.Sequential(L(4, 5), nn.Tanh(), L(5, num_outputs)))
    names = [name for name, _ in model.named_parameters()]
    groups = {g: [n for n, owner in zip(names, owners, strict=True) if owner == g] for g in ("a", "b")}
    left = [n for n, owner in zip(names, owners, strict=True) if not owner]
    groups = {g: members for g, members in {**groups, "rest": left}.items() if members}
    with tempfile.TemporaryDirectory() as folder:
        store = ntkpipe.compute_kernel(
            model,
            inputs(num_samples),
            store=Path(folder) / "s",
            kind=kind,
            groups=groups,
            tile=tile,
            workers=1,
            compute_dtype=dtype,
            self_check=False,
            progress=False,
        )
        for output in range(num_outputs) if kind == "diagonal" else (None,):
            whole = pick(store, None, output).train[:].astype(float)
            parts = sum(pick(store, group, output).train[:].astype(float) for group in groups)
            assert reference.error(parts, whole) <= 4 * np.finfo(dtype).eps


def run(path, **changes):
    options = {
        "kind": "diagonal",
        "groups": {"head": "2.*", "in": "0.weight"},
        "test_inputs": inputs(7, seed=1),
        **changes,
    }
    return ntkpipe.compute_kernel(
        mlp(), inputs(13), store=path, tile=4, workers=1, progress=False, self_check=False, **options
    )


@pytest.mark.parametrize("tiles", [0, 1, 4, 20, 40])
def test_half_written_planes_are_completed_with_the_same_bits(tiles, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        Allowance(patched, tiles, StoreFullError("full"))
        with pytest.raises(StoreFullError):
            run(tmp_path / "cut")
    before = times(tmp_path / "cut")
    run(tmp_path / "cut")
    assert chunks(tmp_path / "cut") == chunks(tmp_path / "whole")
    after = times(tmp_path / "cut")
    assert all(after[name] == written for name, written in before.items())


@pytest.mark.parametrize(
    "name",
    ["kernel/output_1/train/c/0/2", "groups/head/output_2/train/c/1/1", "groups/in/output_0/test_diagonal/c/1/0/0"],
)
def test_only_the_planes_that_a_tile_lacks_are_written(name, tmp_path):
    run(tmp_path / "s")
    before, written = chunks(tmp_path / "s"), times(tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    run(tmp_path / "s")
    assert chunks(tmp_path / "s") == before
    assert {each for each, at in times(tmp_path / "s").items() if at != written[each]} == {name}


def test_a_kernel_of_one_output_is_a_plane_of_the_diagonal(tmp_path):
    store = run(tmp_path / "s")
    for output in range(3):
        alone = run(tmp_path / f"{output}", kind=f"output:{output}")
        for group in (None, "head", "in"):
            one, other = pick(alone, group, None), pick(store, group, output)
            scale = reference.scale(one.train[:].astype(float))
            assert np.abs((one.train - other.train[:]) / scale).max() <= 1e-6
            assert np.allclose(one.test_diagonal, other.test_diagonal, rtol=1e-5)


def test_the_whole_is_the_same_with_and_without_groups(tmp_path):
    """To rounding: sums are added up in another order."""
    one, other = run(tmp_path / "with", kind="ntk"), run(tmp_path / "without", kind="ntk", groups=None)
    assert "groups" not in other.manifest.model_dump()
    assert reference.error(one.train[:].astype(float), other.train[:].astype(float)) <= 1e-6


def test_a_store_without_one_kernel_says_how_to_get_one(tmp_path):
    store = run(tmp_path / "s")
    for name in ("train", "test_train", "test_diagonal"):
        with pytest.raises(ConfigError, match=rf"a kernel for each of 3 outputs; use \.output\(k\)\.{name}"):
            getattr(store, name)
        with pytest.raises(ConfigError, match=r"use \.output\(k\)"):
            getattr(store.group("head"), name)
    with pytest.raises(ConfigError, match="has outputs 0 to 2"):
        store.output(3)
    with pytest.raises(ConfigError, match="has no group 'tail'; it has 'head', 'in'"):
        store.group("tail")
    assert store.groups == {"head": ("2.weight", "2.bias"), "in": ("0.weight",)}
    with pytest.raises(ConfigError, match="no kernels of single outputs"):
        run(tmp_path / "t", kind="pntk").output(0)


@pytest.mark.parametrize(
    "groups", [{"head": "2.weight", "in": "0.weight"}, {"head": "2.*"}, {}, {"top": "2.*", "in": "0.weight"}]
)
def test_a_store_with_other_groups_is_another_one(groups, tmp_path):
    run(tmp_path / "s")
    with pytest.raises(StoreMismatchError, match="groups"):
        run(tmp_path / "s", groups=groups)


def test_the_order_of_groups_is_no_difference(tmp_path):
    run(tmp_path / "s")
    run(tmp_path / "t", groups={"in": "0.weight", "head": "2.*"})
    assert chunks(tmp_path / "s") == chunks(tmp_path / "t")


NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": ("3.*",)}, r"groups.a: '3.\*' matches no selected parameter; these are 0.weight, "),
        ({"a": ("0.*", "3.*")}, r"groups.a: '3.\*' matches no"),
        ({"a": ("0.*",), "b": ("*.bias",)}, "groups 'a' and 'b' both have 0.bias; a parameter"),
    ],
)
def test_groups_that_fit_no_parameters_are_refused(groups, words):
    with pytest.raises(ConfigError, match=words):
        match_groups(groups, NAMES)


def test_groups_have_their_parameters_in_the_order_of_the_model():
    found = match_groups({"b": ("*.weight",), "a": ("2.bias", "0.b*")}, NAMES)
    assert list(found.items()) == [("a", ("0.bias", "2.bias")), ("b", ("0.weight", "2.weight"))]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a b", "zarr.json", "-a", "ä", "a" * 101])
def test_a_group_is_a_folder(name):
    with pytest.raises(ConfigError):
        ntkpipe.plan_kernel(mlp(), inputs(), store="s", groups={name: "*"})


def test_groups_may_not_differ_by_case_alone():
    with pytest.raises(ConfigError, match=r"'Head' would share the folder of 'head'"):
        ntkpipe.plan_kernel(mlp(), inputs(), store="s", groups={"head": "2.*", "Head": "0.*"})


@given(kind=st.sampled_from(KINDS), num_outputs=st.integers(1, 5), groups=st.sets(st.sampled_from("abc")))
def test_planes_are_counted_without_listing_them(kind, num_outputs, groups):
    planes = planes_of(kind, num_outputs, sorted(groups))
    assert num_planes(kind, num_outputs, len(groups)) == len(planes) == len({plane.prefix for plane in planes})
    assert all(plane.array("kernel/train") == f"{plane.prefix}/train" for plane in planes)


def test_no_run_is_planned_with_too_many_planes(tmp_path):
    model = nn.Sequential(L(4, 1, bias=False), L(1, MAX_PLANES // 2 + 1, bias=False))
    with pytest.raises(ConfigError, match="kernels side by side; at most 65536"):
        ntkpipe.plan_kernel(model, inputs(), store=tmp_path / "s", kind="diagonal", groups={"a": "0.*"})


def flops_of(kind, held):
    """Operations that torch counts in a contraction of 40 samples with 30 others, and those that are planned."""
    model = redraw(nn.Sequential(L(30, 40), nn.Tanh(), L(40, 12)))
    samples = torch.randn(70, 30, generator=torch.Generator().manual_seed(0))
    pairs = {"ntk": "all", "trace": "sum", "diagonal": "same"}[kind]
    plain = engine_of(model, samples, torch.eye(12, dtype=torch.float64))
    engine = forced(plain).get(held, plain).with_covectors(torch.eye(12, dtype=torch.float64), pairs)
    with exact_math():
        left, right = (engine.piece(take(samples, range(*part)))[0] for part in ((0, 40), (40, 70)))
        width = 12 if pairs == "all" else 1
        outs = [torch.empty(40 * width, 30 * width, dtype=torch.float64) for _ in range(12 if pairs == "same" else 1)]
        with FlopCounterMode(display=False) as counter:
            contract_planes(left, right, Workspace(), pairs, outs)
        with FlopCounterMode(display=False) as diagonal:
            contract_diagonal_planes(left, pairs, len(outs))
    return counter.get_total_flops(), engine.pair_flops() * 40 * 30, diagonal.get_total_flops()


@pytest.mark.parametrize("held", ["pairwise", "dense"])
def test_single_outputs_do_not_pay_for_pairs_of_them(held):
    """The diagonal costs what the trace does; the full kernel 12 times as much where cotangents are multiplied."""
    full, trace, diagonal = (flops_of(kind, held) for kind in ("ntk", "trace", "diagonal"))
    assert diagonal[0] == trace[0] < full[0] / 4
    assert diagonal[1] == trace[1] < full[1] / 4
    assert diagonal[0] <= 1.05 * diagonal[1]
    assert diagonal[2] == trace[2] < full[2] / 2


def test_groups_multiply_nothing_twice():
    """But for a bias that is in another group than the weight of its layer: apart they take a product more."""
    model, samples = redraw(normed()), X.double()
    plain = engine_of(model, X, torch.eye(3, dtype=torch.float64))
    names = plain.model.names
    counted = set()
    for groups in ((), (names[:2],), (names[:2], names[2:5], names[5:])):
        engine = plain.changed(setup=replace(plain.setup, groups=groups))
        with exact_math():
            with Meter() as jacobians:
                left, right = (engine.piece(samples[start : start + 5])[0] for start in (0, 5))
            outs = [torch.empty(15, 15, dtype=torch.float64) for _ in range(len(groups) + 1)]
            with FlopCounterMode(display=False) as contraction:
                contract_planes(left, right, Workspace(), "all", outs)
        counted.add((jacobians.num_flops, contraction.get_total_flops()))
    assert len(counted) == 1


def test_the_certificate_of_each_plane_finds_its_wrong_entry(tmp_path):
    store = run(tmp_path / "s", groups={"head": "2.*", "in": "0.*"})
    assert ntkpipe.verify(store, mlp(), progress=False).is_good
    array = store.store.arrays["groups/in/output_1/train"]
    tile = array.read((0, 2)).copy()
    tile[1, 2] *= 1.05
    array.write((0, 2), tile)
    report = ntkpipe.verify(store, mlp(), progress=False)
    assert [finding.array for finding in report.findings] == ["groups/in/output_1/train"]
    (bad,) = (each for each in report.certificates if not each["is_good"])
    assert set(bad["suspect_rows"]) & {1, 10}


def test_a_group_that_is_zero_but_for_rounding_is_good(tmp_path):
    """A shift of all logits: softmax does not depend on it."""
    model = redraw(Custom(lambda m, x: torch.softmax(m.a(x) + m.c, 1), a=L(4, 3), c=nn.Parameter(torch.zeros(1))))
    store = ntkpipe.compute_kernel(
        model, inputs(30), store=tmp_path / "s", groups={"c": "c"}, tile=8, kind="ntk", workers=1, progress=False
    )
    assert np.abs(store.group("c").train[:]).max() < 1e-12
    assert ntkpipe.verify(store, model, progress=False).is_good


def test_a_hostile_manifest_has_no_endless_planes(tmp_path):
    store = run(tmp_path / "s", groups=None)
    manifest = store.manifest.model_copy(update={"num_outputs": 10**12})
    with pytest.raises(StoreError, match="kernels side by side"):
        layouts(manifest)


def test_every_plane_grows_and_keeps_its_entries(tmp_path):
    def data(num_train, num_test):
        return {"inputs": inputs(30)[:num_train], "test_inputs": inputs(20, seed=1)[:num_test]}

    options = {"kind": "diagonal", "groups": {"head": "2.*"}, "tile": 4, "workers": 1, "progress": False}
    small = ntkpipe.compute_kernel(mlp(), store=tmp_path / "s", **options, **data(10, 3))
    old = {(g, o): pick(small, g, o).train[:] for g in (None, "head") for o in range(3)}
    grown = ntkpipe.compute_kernel(mlp(), store=tmp_path / "s", grow=True, **options, **data(17, 6))
    whole = ntkpipe.compute_kernel(mlp(), store=tmp_path / "w", **options, **data(17, 6))
    for (group, output), entries in old.items():
        found = pick(grown, group, output)
        assert np.array_equal(found.train[:10, :10], entries)
        assert np.allclose(found.train, pick(whole, group, output).train, rtol=1e-5, atol=1e-6)
        assert np.allclose(found.test_diagonal, pick(whole, group, output).test_diagonal, rtol=1e-5, atol=1e-6)
    assert ntkpipe.verify(grown, mlp(), progress=False).is_good
