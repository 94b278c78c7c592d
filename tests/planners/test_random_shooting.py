"""Random shooting: the cheapest of all candidates, `start` among them."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.planners import RandomShooting


def distance(actions):
    return jnp.sum(jnp.square(actions), axis=(1, 2))


def test_the_plan_is_the_cheapest_of_all_iterations():
    planner = RandomShooting(horizon=2, num_samples=20, num_iterations=30)
    plan = planner.plan(distance, jr.key(0), start=jnp.full((2, 2), 2.0))
    np.testing.assert_allclose(plan.cost, plan.lowest_costs.min())
    assert len(np.unique(plan.lowest_costs)) > 20  # each iteration draws its own candidates


def test_a_perfect_start_is_the_plan():
    plan = RandomShooting(horizon=2).plan(distance, jr.key(0), start=jnp.zeros((2, 2)))
    np.testing.assert_array_equal(plan.actions, 0)
