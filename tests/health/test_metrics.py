"""Each sign of health against its definition in float64, from full rank to total collapse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jepax.health.metrics import (
    alpha_req,
    collapse_metrics,
    dead_features,
    feature_std,
    lidar,
    mean_cosine,
    rankme,
    std_quantiles,
)


def reference(x):
    sigma = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = sigma / sigma.sum()
    return np.exp(-np.sum(p[p > 0] * np.log(p[p > 0])))


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (64, 64)])
def test_effective_rank_equals_numpys(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 1e-2, shape[1])
    np.testing.assert_allclose(rankme(x.astype(np.float32)), reference(x), rtol=1e-3)


def test_effective_rank_of_a_low_rank_matrix_is_not_inflated_by_rounding():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 200))
    np.testing.assert_allclose(rankme(x.astype(np.float32)), reference(x), rtol=1e-3)


def test_orthonormal_rows_have_full_rank():
    np.testing.assert_allclose(rankme(np.eye(32, dtype=np.float32)), 32, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_rows_have_rank_one(value):
    row = value * np.random.default_rng(0).normal(size=64)
    np.testing.assert_allclose(rankme(np.tile(row, (256, 1)).astype(np.float32)), 1, atol=1e-3)


def test_feature_std():
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32) * np.arange(8, dtype=np.float32)
    np.testing.assert_allclose(feature_std(x), x.std(0).mean(), rtol=1e-5)
    assert feature_std(jnp.full((10, 3), 7.0)) == 0


def spread_out(n, dim, seed=0):
    """Embeddings with a mean, and features of very different deviations."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) * np.geomspace(1, 1e-3, dim) + rng.normal(size=dim)
    return x.astype(np.float32)


@pytest.mark.parametrize("shape", [(200, 30), (30, 200)])
def test_alpha_req_is_the_slope_of_the_covariances_spectrum(shape):
    x = spread_out(*shape)
    spectrum = np.linalg.svd(x.astype(np.float64) - x.astype(np.float64).mean(0), compute_uv=False) ** 2
    spectrum = spectrum[: min(shape[0] - 1, shape[1])]
    slope = np.polyfit(np.log(np.arange(1, len(spectrum) + 1)), np.log(spectrum), 1)[0]
    np.testing.assert_allclose(alpha_req(x), -slope, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_alpha_req_finds_the_exponent_of_a_power_law(alpha):
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(65, 65)))[0][:, 1:]
    rows = np.linalg.qr(rows - rows.mean(0))[0]  # orthonormal columns, each of mean 0
    x = rows * np.arange(1, 65) ** (-alpha / 2)
    np.testing.assert_allclose(alpha_req(x), alpha, rtol=1e-5)


def test_alpha_req_of_what_has_no_spectrum_is_not_a_number():
    assert np.isnan(alpha_req(np.ones((8, 4), np.float32)))


@pytest.mark.parametrize("dim", [5, 40])
def test_lidar_equals_its_definition(dim):
    """Sigma_w^-1/2 Sigma_b Sigma_w^-1/2 written out with sums over images and views, and a general square root."""
    rng, delta = np.random.default_rng(0), 1e-3
    x = (rng.normal(size=(12, 1, dim)) + 0.3 * rng.normal(size=(12, 6, dim))).astype(np.float32).astype(np.float64)
    means = x.mean(1)
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / 12
    within = sum(np.outer(v - m, v - m) for views, m in zip(x, means, strict=True) for v in views) / 72
    spectrum = np.linalg.eigvals(np.linalg.solve(within + delta * np.eye(dim), between)).real  # similar matrices
    p = np.clip(spectrum, 0, None) / np.clip(spectrum, 0, None).sum()
    expected = np.exp(-np.sum(p[p > 1e-12] * np.log(p[p > 1e-12])))
    np.testing.assert_allclose(lidar(x, delta=delta), expected, rtol=1e-5)


def test_lidar_counts_the_directions_that_tell_images_apart():
    rng = np.random.default_rng(0)
    centers = np.zeros((400, 16))
    centers[:, :3] = 10 * rng.normal(size=(400, 3))
    views = centers[:, None] + 0.1 * rng.normal(size=(400, 8, 16))
    np.testing.assert_allclose(lidar(views), 3, rtol=0.05)
    assert lidar(np.tile(views[:1], (4, 1, 1))) == 1


def test_quantiles_of_the_deviations():
    x = spread_out(100, 9)
    std = np.sort(np.sqrt(np.mean((x.astype(np.float64) - x.astype(np.float64).mean(0)) ** 2, 0)))
    expected = [std[0], std[0] + 0.8 * (std[1] - std[0]), std[4], std[7] + 0.2 * (std[8] - std[7]), std[8]]
    np.testing.assert_allclose(std_quantiles(x), expected, rtol=1e-5)


def test_dead_features():
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    x[:, :3] = 5.0
    x[:, 3] *= 1e-3
    assert dead_features(x) == 0.5
    assert dead_features(x * 1e-9) == 0.5  # a question of share, not of unit
    assert dead_features(1.0 + 1e-8 * x.astype(np.float64)) == 1.0  # all of them: nothing but rounding
    assert dead_features(np.zeros((4, 3), np.float32)) == 1.0


def test_mean_cosine():
    x = spread_out(20, 6)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    pairs = [unit[i] @ unit[j] for i in range(20) for j in range(20) if i != j]
    np.testing.assert_allclose(mean_cosine(x), np.mean(pairs), rtol=1e-5)
    np.testing.assert_allclose(mean_cosine(np.tile(x[:1], (5, 1))), 1, rtol=1e-12)
    assert mean_cosine(np.zeros((4, 3), np.float32)) == 0


def test_everything_that_is_logged_of_a_batch():
    logged = collapse_metrics(spread_out(20, 6), "health/projection")
    names = ("std", "std_quantiles", "dead_fraction", "mean_cosine", "rankme", "alpha_req")
    assert list(logged) == [f"health/projection/{name}" for name in names]
    assert logged["health/projection/rankme"] == rankme(spread_out(20, 6))
