"""The cross-entropy method against recorded iterations: the same noise gives the same elites and Gaussian."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax.planners import CEM, warm_start
from tests.parity.reference import GOLDEN

TYPES = {"f32": (np.float32, 1e-5, nullcontext), "f64": (np.float64, 1e-10, lambda: jax.enable_x64(True))}


def recorded():
    path = GOLDEN / "worldmodel" / "cem.npz"
    if not path.exists():
        pytest.skip("no worldmodel/cem.npz in the folder of recorded numbers")
    with np.load(path) as file:
        return dict(file)


def planner_of(golden):
    c = {name.removeprefix("config."): value.item() for name, value in golden.items() if name.startswith("config.")}
    return CEM(
        horizon=c["horizon"],
        num_samples=c["samples"],
        num_iterations=c["iterations"],
        num_elites=c["elites"],
        initial_std=c["initial_std"],
    )


def cost_of(target, mix):
    """Squared distance from the target after a linear map, plus waves: several minima."""

    def cost(actions):
        mixed = jnp.einsum("ij,shj->shi", mix, actions - target)
        return jnp.sum(jnp.square(mixed), axis=(1, 2)) + 0.3 * jnp.sum(jnp.sin(3 * actions), axis=(1, 2))

    return cost


def start_of(golden, start):
    """Zeros, or what is left of a plan of which one action was executed."""
    rest = golden["in.init_mean"]
    previous = jnp.concatenate([jnp.full_like(rest[:, :1], 7), rest], axis=1)
    return jnp.zeros_like(previous) if start == "cold" else jax.vmap(lambda plan: warm_start(plan, 1))(previous)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_every_iteration(start, precision):
    golden = recorded()
    planner = planner_of(golden)
    dtype, tolerance, context = TYPES[precision]

    @jax.jit
    @jax.vmap
    def iterate(target, noise, mean, std):
        return planner.iterate(cost_of(target, jnp.asarray(golden["in.mix"], dtype)), noise, mean, std)

    with context():
        targets, mean = jnp.asarray(golden["in.target"], dtype), jnp.asarray(start_of(golden, start), dtype)
        std = jnp.full_like(mean, planner.initial_std)
        for i in range(planner.num_iterations):
            noise = golden["in.noise"][i].astype(dtype)
            by_hand = noise * np.asarray(std)[:, None] + np.asarray(mean)[:, None]
            by_hand[:, 0] = mean
            step = iterate(targets, noise, mean, std)
            mean, std = step.mean, step.std

            assert mean.dtype == dtype
            np.testing.assert_allclose(step.candidates, by_hand, rtol=0, atol=tolerance)
            np.testing.assert_array_equal(step.elites, golden[f"{start}.elites.{precision}"][i])
            for name, ours in {"cost": step.costs, "mean": mean, "std": std}.items():
                theirs = golden[f"{start}.{name}.{precision}"][i]
                np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
