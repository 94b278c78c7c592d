"""Effective rank against NumPy's float64 singular values, from full rank to total collapse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jepax.evals.collapse import effective_rank, feature_std


def reference(x):
    sigma = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = sigma / sigma.sum()
    return np.exp(-np.sum(p[p > 0] * np.log(p[p > 0])))


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (64, 64)])
def test_effective_rank_equals_numpys(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 1e-2, shape[1])
    np.testing.assert_allclose(effective_rank(x.astype(np.float32)), reference(x), rtol=1e-3)


def test_effective_rank_of_a_low_rank_matrix_is_not_inflated_by_rounding():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 200))
    np.testing.assert_allclose(effective_rank(x.astype(np.float32)), reference(x), rtol=1e-3)


def test_orthonormal_rows_have_full_rank():
    np.testing.assert_allclose(effective_rank(np.eye(32, dtype=np.float32)), 32, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_rows_have_rank_one(value):
    row = value * np.random.default_rng(0).normal(size=64)
    np.testing.assert_allclose(effective_rank(np.tile(row, (256, 1)).astype(np.float32)), 1, atol=1e-3)


def test_feature_std():
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32) * np.arange(8, dtype=np.float32)
    np.testing.assert_allclose(feature_std(x), x.std(0).mean(), rtol=1e-5)
    assert feature_std(jnp.full((10, 3), 7.0)) == 0
