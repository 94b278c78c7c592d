"""MPPI: the weights of the elites."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.planners import MPPI
from jepax.types import UserError

ELITES, COSTS = jr.normal(jr.key(0), (4, 3, 2)), jnp.asarray([3.0, 4.0, 4.5, 9.0])


@pytest.mark.parametrize("inverse_temperature", [0.0, 0.5, 100.0])
def test_elites_are_weighted_by_their_costs(inverse_temperature):
    mean, std = MPPI(inverse_temperature=inverse_temperature).fit(ELITES, COSTS)
    weights = np.exp(inverse_temperature * (3 - np.asarray(COSTS)))
    weights /= weights.sum()
    by_hand = np.einsum("e,eha->ha", weights, ELITES)
    np.testing.assert_allclose(mean, by_hand, atol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(np.einsum("e,eha->ha", weights, (ELITES - by_hand) ** 2)), atol=1e-6)


def test_the_limits_of_the_temperature():
    np.testing.assert_allclose(MPPI(inverse_temperature=0.0).fit(ELITES, COSTS)[0], ELITES.mean(0), atol=1e-6)
    mean, std = MPPI(inverse_temperature=100.0).fit(ELITES, COSTS)
    np.testing.assert_allclose(mean, ELITES[0], atol=1e-6)
    np.testing.assert_allclose(std, 0, atol=1e-6)


def test_a_cost_of_any_size_gives_finite_weights():
    huge = jnp.asarray([-3.0e38, 0.0, 3.0e38, 3.4e38])
    mean, std = MPPI(inverse_temperature=10.0).fit(ELITES, huge)
    np.testing.assert_allclose(mean, ELITES[0], atol=1e-6)
    assert np.all(np.isfinite(std))


def test_a_negative_temperature():
    with pytest.raises(UserError, match=r"planner.inverse_temperature=-1.0 must be at least 0"):
        MPPI(inverse_temperature=-1.0)
