"""The recurrence holds to rounding through restarts and exhausted spaces; a refinement is nearly worth a pass."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.spectral.thick_restart import ThickRestart


def limits(values):
    return np.maximum(1e-6 * abs(values), 1e-300)


def advanced(matrix, passes, *, k=10, block=8, max_basis=48, keep=20):
    operator, space = DenseOperator(matrix), ThickRestart(len(matrix), block, max_basis, keep, 0)
    for _ in range(passes):
        space.advance(operator, k, limits)
    return space


def true_residuals(matrix, vectors):
    products = matrix @ vectors
    values = np.einsum("ij,ij->j", vectors, products)
    return np.linalg.norm(products - vectors * values, axis=0)


@pytest.mark.parametrize("passes", [1, 4, 6, 7, 30])
@pytest.mark.parametrize("name", spectra(200))
def test_the_recurrence_holds(name, passes):
    matrix = matrix_with_spectrum(spectra(200)[name])
    space = advanced(matrix, passes)
    both = np.concatenate([space._vectors[:, : space.size], space._next], axis=1)
    np.testing.assert_allclose(both.T @ both, np.eye(both.shape[1]), atol=1e-13)
    coefficients = np.concatenate([space._projected, space._coupling])
    norm = np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(matrix @ space._vectors[:, : space.size], both @ coefficients, atol=1e-12 * norm)
    found = space.ritz(10)
    np.testing.assert_allclose(
        found.residuals, true_residuals(matrix, space.combine(found.coordinates)), atol=1e-12 * norm
    )


@pytest.mark.parametrize("condition", [1e4, 1e6])
def test_a_refinement_is_nearly_worth_a_pass(condition):
    matrix = matrix_with_spectrum(power_law(600, condition=condition))
    before = advanced(matrix, 9, k=20, block=10, max_basis=200, keep=60)
    after = advanced(matrix, 10, k=20, block=10, max_basis=200, keep=60)
    refined = before.refined(20)
    vectors = before.combine(refined.coordinates)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(20), atol=1e-13)
    worst = [
        (residuals / refined.values).max()
        for residuals in (before.ritz(20).residuals, true_residuals(matrix, vectors), after.ritz(20).residuals)
    ]
    gained, possible = np.log(worst[0] / worst[1]), np.log(worst[0] / worst[2])
    assert gained > 0.8 * possible > 0
    # What it predicts of itself.
    assert (refined.residuals / refined.values).max() == pytest.approx(worst[1], rel=0.5)


def test_nothing_is_refined_where_the_next_block_is_not_small():
    """On a flat spectrum the correction would add as much as it takes."""
    space = advanced(matrix_with_spectrum(np.linspace(2.0, 1.0, 200)), 4)
    np.testing.assert_array_equal(space.refined(10).coordinates, space.ritz(10).coordinates)
