"""Terms of predictions: they add up to these, and the largest are found."""

from pathlib import Path

import numpy as np
import pytest
from regressions import NUM_OUTPUTS, NUM_TEST, NUM_TRAIN, features, make_store

from ntkpipe import KernelRegression, influence
from ntkpipe.base.errors import ConfigError


@pytest.mark.parametrize("kind", ["pntk", "ntk"])
@pytest.mark.parametrize("targets", ["classes", "real"])
def test_all_terms_are_the_prediction(tmp_path: Path, kind: str, targets: str) -> None:
    store = make_store(tmp_path / "k.zarr", kind=kind, targets=targets)
    model = KernelRegression(0.1).fit(store)
    found = influence(model, store, top=NUM_TRAIN)
    outputs = model.predict_outputs(store)
    width = NUM_OUTPUTS if kind == "ntk" else 1
    kernel = store.test_train.to_numpy().reshape(NUM_TEST, width, NUM_TRAIN, width)
    weights = model.dual_coef_.reshape(NUM_TRAIN, NUM_OUTPUTS)
    rule = "mqip,ip->mqi" if kind == "ntk" else "mqi,ip->mpi"
    terms = np.einsum(rule, kernel if kind == "ntk" else kernel[..., 0], weights)
    np.testing.assert_allclose(terms.sum(axis=2), outputs, atol=1e-9)
    by_sample = np.empty((NUM_TEST, NUM_TRAIN))
    np.put_along_axis(by_sample, found.top_samples, found.top_terms, axis=1)
    if targets == "classes":
        column = outputs.argmax(axis=1)
        np.testing.assert_array_equal(found.predicted, column)
        expected = terms[np.arange(NUM_TEST), column]
    else:
        assert (found.predicted == -1).all()
        expected = np.linalg.norm(terms, axis=1)
    np.testing.assert_allclose(by_sample, expected, atol=1e-9)
    np.testing.assert_allclose(found.mean_size, np.abs(expected).mean(axis=0), rtol=1e-9)
    assert found.top_share == pytest.approx(1.0)
    sizes = np.abs(found.top_terms)
    assert (np.diff(sizes, axis=1) <= 0).all()
    assert found.most_influential[0] == np.abs(expected).mean(axis=0).argmax()
    few = influence(model, store.test_train.to_numpy(), top=4)
    np.testing.assert_array_equal(few.top_samples, found.top_samples[:, :4])
    assert few.top_share == pytest.approx(np.mean(sizes[:, :4].sum(axis=1) / sizes.sum(axis=1)))
    assert f"{few.most_influential[0]} (" in str(few)


def test_a_single_output_has_signs(rng: np.random.Generator) -> None:
    kernel, test_kernel, _ = features(rng)
    weights = rng.standard_normal(30)
    found = influence(weights, test_kernel, top=30)
    np.testing.assert_allclose(found.top_terms.sum(axis=1), test_kernel @ weights, atol=1e-12)
    assert (found.top_terms < 0).any()
    assert (found.predicted == 0).all()
    del kernel


def test_initial_outputs_decide_the_class(rng: np.random.Generator) -> None:
    _, test_kernel, _ = features(rng)
    offset = np.zeros((9, 2))
    offset[:, 1] = 1e6
    found = influence(rng.standard_normal((30, 2)), test_kernel, test_initial_outputs=offset)
    assert (found.predicted == 1).all()


def test_wrong_input_is_named(rng: np.random.Generator) -> None:
    kernel, test_kernel, _ = features(rng)
    with pytest.raises(ConfigError, match="not fitted"):
        influence(KernelRegression(), test_kernel)
    with pytest.raises(ConfigError, match="a fitted model knows"):
        influence(KernelRegression(1.0).fit(kernel, np.zeros(30)), test_kernel, width=1)
    with pytest.raises(ConfigError, match="top=0"):
        influence(np.zeros(30), test_kernel, top=0)
    with pytest.raises(ConfigError, match="4 rows a sample"):
        influence(np.zeros(30), test_kernel, width=4)
