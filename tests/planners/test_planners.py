"""The contract of a planner, for every planner of the registry."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.planners import CEM, PLANNERS, warm_start
from jepax.types import UserError

TINY = {
    "cem": {"num_samples": 100, "num_iterations": 15, "num_elites": 16},
    "mppi": {"num_samples": 200, "num_iterations": 15, "num_elites": 60, "inverse_temperature": 1.0},
    "gradient": {"num_samples": 4, "num_iterations": 60, "learning_rate": 0.1},
    "random_shooting": {"num_samples": 200, "num_iterations": 20},
}
TOLERANCE = {"cem": 0.05, "mppi": 0.05, "gradient": 0.05, "random_shooting": 0.7}
TARGET = jnp.asarray([[0.5, -0.7], [0.1, 0.9], [-0.4, 0.2]])
ZEROS = jnp.zeros((3, 2))
LOW, HIGH = jnp.asarray([-0.3, -0.1]), jnp.asarray([0.3, 0.6])

every_planner = pytest.mark.parametrize("name", PLANNERS)


def make(name):
    return PLANNERS[name](horizon=3, **TINY[name])


def distance_to(target):
    return lambda actions: jnp.sum(jnp.square(actions - target), axis=(1, 2))


@partial(jax.jit, static_argnums=0)
def plan(planner, target, key, start):
    return planner.plan(distance_to(target), key, start=start)


@every_planner
def test_finds_the_minimum_of_a_quadratic(name):
    planner = make(name)
    found = plan(planner, TARGET, jr.key(0), planner.cold_start(2))
    assert found.actions.shape == (3, 2) and found.cost.shape == ()
    assert np.abs(found.actions - TARGET).max() < TOLERANCE[name]
    np.testing.assert_allclose(found.cost, np.square(found.actions - TARGET).sum(), rtol=1e-4, atol=1e-7)
    assert found.lowest_costs.shape == (planner.num_iterations,) and found.cost <= found.lowest_costs[0]


@every_planner
def test_stays_inside_the_bounds(name):
    """The coordinates are independent: the minimum inside the bounds is the target, clipped."""

    def cost(actions):
        outside = jnp.any((actions < LOW) | (actions > HIGH), axis=(1, 2))
        return distance_to(TARGET)(actions) + jnp.where(outside, jnp.nan, 0.0)

    planner = make(name)
    found = jax.jit(lambda key: planner.plan(cost, key, start=ZEROS + 5, bounds=(LOW, HIGH)))(jr.key(0))
    assert np.all((found.actions >= LOW) & (found.actions <= HIGH))
    assert np.isfinite(found.cost) and np.all(found.lowest_costs < 10)
    assert np.abs(found.actions - np.clip(TARGET, LOW, HIGH)).max() < TOLERANCE[name] / 2


@every_planner
def test_the_key_determines_the_plan(name):
    first, again, other = (plan(make(name), 3 * TARGET, jr.key(seed), ZEROS) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first.actions != other.actions)


@every_planner
def test_episodes_together_are_as_one_by_one(name):
    planner = make(name)
    episodes = jnp.stack([TARGET, -TARGET]), jr.split(jr.key(3)), jr.normal(jr.key(4), (2, 3, 2))
    together = jax.jit(jax.vmap(partial(plan, planner)))(*episodes)
    alone = [plan(planner, *(array[i] for array in episodes)) for i in range(2)]
    for name in ("actions", "cost", "lowest_costs"):
        np.testing.assert_allclose(getattr(together, name), [getattr(one, name) for one in alone], rtol=1e-3, atol=1e-4)


@every_planner
def test_a_warm_start_helps(name):
    """The goal is too far for one search; the second one continues where the first one ended."""
    planner, target = make(name), 10 + TARGET
    cold = plan(planner, target, jr.key(0), ZEROS)
    warm = plan(planner, target, jr.key(1), warm_start(cold.actions, 0))
    assert warm.cost < 0.8 * cold.cost


@every_planner
def test_a_cost_that_is_not_finite_counts_as_the_largest(name):
    @jax.jit
    def plan_where(limit, bad):
        cost = lambda actions: jnp.where(actions[:, 0, 0] > limit, bad, distance_to(TARGET)(actions))  # noqa: E731
        return make(name).plan(cost, jr.key(0), start=ZEROS)

    found = plan_where(0.1, -np.inf)
    assert found.actions[0, 0] <= 0.1 and found.cost < 3
    assert plan_where(-99.0, np.nan).cost == np.finfo(np.float32).max


@every_planner
def test_one_program_of_one_type(name):
    """Calculates in the type of `start`; `cost` is traced at most twice, however many iterations there are."""
    shapes = []

    def cost(actions):
        shapes.append(actions.shape)
        return distance_to(TARGET)(actions)

    def plan_in_float64():
        bounds = -1, np.ones(2, np.float32)
        return make(name).plan(cost, jr.key(0), start=jnp.zeros((3, 2), jnp.float64), bounds=bounds)

    with jax.enable_x64(True):
        found = jax.eval_shape(plan_in_float64)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float64)}
    assert len(shapes) <= 2


@every_planner
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "planner.horizon=0 must be at least 1"),
        ({"num_samples": 0}, "planner.num_samples=0 must be at least 1"),
        ({"num_iterations": 0}, "planner.num_iterations=0 must be at least 1"),
        ({"initial_std": 0.0}, "planner.initial_std=0.0 must be above 0"),
    ],
)
def test_invalid_settings(name, settings, message):
    with pytest.raises(UserError, match=message):
        replace(PLANNERS[name](), **settings)


@every_planner
def test_a_start_of_another_horizon(name):
    with pytest.raises(UserError, match=r"start has 2 actions, but planner.horizon=3"):
        make(name).plan(distance_to(TARGET[:2]), jr.key(0), start=ZEROS[:2])


def test_warm_start_shifts_and_pads_with_zeros():
    actions = jnp.arange(1.0, 11).reshape(5, 2)
    np.testing.assert_array_equal(warm_start(actions, 0), actions)
    np.testing.assert_array_equal(warm_start(actions, 2), [[5, 6], [7, 8], [9, 10], [0, 0], [0, 0]])
    np.testing.assert_array_equal(warm_start(actions, 5), np.zeros((5, 2)))


def test_published_settings():
    c = CEM()
    assert (c.num_samples, c.num_iterations, c.num_elites, c.horizon, c.initial_std) == (300, 30, 30, 5, 1)
