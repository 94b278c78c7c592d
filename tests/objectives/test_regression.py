"""Distances against their definitions."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.objectives import masked_mean, smooth_l1


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_smooth_l1(beta):
    distance = jnp.linspace(-4.0, 4.0, 81)
    expected = [d * d / (2 * beta) if abs(d) < beta else abs(d) - beta / 2 for d in np.asarray(distance, np.float64)]
    np.testing.assert_allclose(smooth_l1(distance, jnp.zeros(81), beta), expected, rtol=1e-5, atol=1e-6)


def test_smooth_l1_clips_the_gradient():
    slope = jax.vmap(jax.grad(lambda d: smooth_l1(d, jnp.zeros(()))))(jnp.array([-9.0, -0.3, 0.3, 9.0]))
    np.testing.assert_allclose(slope, [-1.0, -0.3, 0.3, 1.0], rtol=1e-6)


def test_padding_has_no_weight():
    values, valid = jr.normal(jr.key(0), (2, 3, 4, 5)), jr.bernoulli(jr.key(1), 0.6, (2, 3, 4))
    expected = np.asarray(values)[np.asarray(valid)].mean()
    np.testing.assert_allclose(masked_mean(values, valid), expected, rtol=1e-5)
    changed = jnp.where(valid[..., None], values, 1e6)
    np.testing.assert_array_equal(masked_mean(changed, valid), masked_mean(values, valid))
