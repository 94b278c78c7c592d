"""VICReg's regularizers against their definitions in float64."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.objectives import covariance, variance
from jepax.objectives.vicreg import VARIANCE_EPS


@pytest.fixture
def embeddings():
    """Deviations from 0.1 to 2, so that the hinge is open for some dimensions and shut for others; correlated."""
    mixed = jr.normal(jr.key(0), (32, 12)) @ jr.normal(jr.key(1), (12, 12)) / 3
    return mixed * jnp.linspace(0.1, 2.0, 12) + 5.0


def test_variance_is_the_mean_hinge_of_each_deviation(embeddings):
    deviation = np.sqrt(np.asarray(embeddings, np.float64).var(axis=0, ddof=1) + VARIANCE_EPS)
    assert (deviation < 1).any() and (deviation > 1).any()
    for floor in (1.0, 0.5):
        expected = np.maximum(floor - deviation, 0).mean()
        np.testing.assert_allclose(variance(embeddings, floor), expected, rtol=1e-5)


def test_covariance_is_the_off_diagonal_energy_per_dimension(embeddings):
    matrix = np.cov(np.asarray(embeddings, np.float64), rowvar=False)
    expected = (matrix[~np.eye(12, dtype=bool)] ** 2).sum() / 12
    np.testing.assert_allclose(covariance(embeddings), expected, rtol=1e-4)


def test_independent_dimensions_of_unit_deviation_cost_nothing():
    independent = jnp.concatenate([jnp.eye(8), -jnp.eye(8)]) * jnp.sqrt(7.6)
    np.testing.assert_allclose([variance(independent), covariance(independent)], 0.0, atol=1e-5)


@pytest.mark.parametrize("term", [variance, covariance])
def test_neither_sees_the_mean_and_both_have_gradients_at_collapse(embeddings, term):
    np.testing.assert_allclose(term(embeddings + 3.0), term(embeddings), rtol=1e-3)
    assert np.isfinite(jax.grad(term)(jnp.ones((4, 3)))).all()
