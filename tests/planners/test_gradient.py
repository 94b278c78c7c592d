"""Gradient descent on the actions: independent starts, the best of all iterations."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.planners import GradientPlanner
from jepax.types import UserError


def double_well(actions):
    """Two minima for each number, at -1 and 1; the one at -1 is lower."""
    return jnp.sum(jnp.square(jnp.square(actions) - 1) + 0.3 * actions, axis=(1, 2))


def test_several_starts_find_the_better_minimum():
    planners = (GradientPlanner(horizon=1, num_samples=count) for count in (1, 20))
    alone, several = (planner.plan(double_well, jr.key(0), start=jnp.ones((1, 1))) for planner in planners)
    assert alone.actions[0, 0] > 0.9 and several.actions[0, 0] < -0.9


def test_one_update_is_adams():
    """The first update of Adam is the sign of the gradient, times the learning rate."""
    planner = GradientPlanner(horizon=2, num_samples=1, num_iterations=2, learning_rate=0.25)
    plan = planner.plan(lambda a: jnp.sum(jnp.square(a - 3), axis=(1, 2)), jr.key(0), start=jnp.zeros((2, 1)))
    np.testing.assert_allclose(plan.actions, 0.25, rtol=1e-5)
    np.testing.assert_allclose(plan.lowest_costs, [18, 2 * 2.75**2], rtol=1e-5)


def test_the_plan_is_the_best_of_all_iterations():
    """With a step too long for the valley, the last candidates are worse than the first."""
    planner = GradientPlanner(horizon=1, num_samples=1, num_iterations=2, learning_rate=9.0)
    plan = planner.plan(lambda a: jnp.sum(jnp.square(a - 1), axis=(1, 2)), jr.key(0), start=jnp.zeros((1, 1)))
    assert plan.lowest_costs[1] > plan.lowest_costs[0] == plan.cost == 1


def test_a_learning_rate_of_zero():
    with pytest.raises(UserError, match=r"planner.learning_rate=0.0 must be above 0"):
        GradientPlanner(learning_rate=0.0)
