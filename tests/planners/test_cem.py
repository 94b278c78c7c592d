"""The cross-entropy method: one iteration, and its settings."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.planners import CEM, MPPI
from jepax.planners.base import candidates_around
from jepax.types import UserError


def cost(actions):
    return jnp.sum(jnp.square(actions - 1), axis=(1, 2))


def test_one_iteration():
    planner = CEM(horizon=2, num_samples=6, num_elites=3, num_iterations=1)
    noise = jr.normal(jr.key(0), (6, 2, 1))
    mean, std = jnp.asarray([[0.5], [2.0]]), jnp.asarray([[1.0], [3.0]])
    step = jax.jit(partial(planner.iterate, cost))(noise, mean, std)

    candidates = np.asarray(noise) * np.asarray(std) + np.asarray(mean)
    candidates[0] = mean  # the mean competes
    np.testing.assert_allclose(step.candidates, candidates, rtol=1e-6)
    np.testing.assert_array_equal(step.elites, np.argsort(cost(candidates))[:3])
    np.testing.assert_allclose(step.mean, candidates[step.elites].mean(0), rtol=1e-5)
    np.testing.assert_allclose(step.std, candidates[step.elites].std(0, ddof=1), rtol=1e-5)


def test_candidates_are_clipped_only_if_there_are_bounds():
    planner = CEM(horizon=2, num_samples=50, num_elites=5)
    noise, zeros = jr.normal(jr.key(0), (50, 2, 1)), jnp.zeros((2, 1))
    assert np.abs(candidates_around(zeros, zeros + 9, noise)).max() > 9
    candidates = jax.jit(partial(planner.iterate, cost))(noise, zeros, zeros + 9, (-1, 0.5)).candidates
    assert candidates.min() == -1 and candidates.max() == 0.5


@pytest.mark.parametrize("planner", [CEM, MPPI])
@pytest.mark.parametrize("num_elites", [1, 41])
def test_elites_that_make_no_sense(planner, num_elites):
    with pytest.raises(UserError, match=rf"planner.num_elites={num_elites} must be from 2 to num_samples=40"):
        planner(num_samples=40, num_elites=num_elites)
