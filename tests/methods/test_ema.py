"""The schedule and the move of a teacher."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.ema import EMAConfig, ema_update, init_ema
from jepax.types import UserError


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [0.9, 0.95, 1.0]), ("cosine", [0.9, 0.95, 1.0]), ("constant", [0.9, 0.9, 0.9])]
)
def test_schedules(shape, expected):
    config = EMAConfig(start=0.9, end=1.0, schedule=shape)
    np.testing.assert_allclose([config.at(step, 10) for step in (0, 5, 10)], expected, rtol=1e-6)


def test_a_horizon_shortens_or_lengthens_the_path():
    np.testing.assert_allclose(EMAConfig(start=0.9, schedule_stretch=0.5).at(5, 10), 1.0, rtol=1e-6)
    np.testing.assert_allclose(EMAConfig(start=0.9, schedule_stretch=2.0).at(10, 10), 0.95, rtol=1e-6)


def test_a_teacher_is_a_copy_that_moves_by_its_share():
    online = eqx.nn.Linear(2, 2, key=jr.key(0))
    teacher = init_ema(online)
    assert teacher.average.weight is not online.weight
    np.testing.assert_array_equal(teacher.average.weight, online.weight)
    other = eqx.tree_at(lambda m: m.bias, online, online.bias + 2.0)
    moved, metrics = ema_update(teacher, other, jnp.float32(0.75))
    np.testing.assert_allclose(moved.average.bias - online.bias, 0.5, rtol=1e-5)
    np.testing.assert_array_equal(moved.average.weight, online.weight)
    np.testing.assert_allclose(
        [metrics["ema/momentum"], metrics["ema/update_norm"]], [0.75, 0.5 * np.sqrt(2)], rtol=1e-5
    )


def perturbed(tree, scale, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jr.split(jr.key(seed), len(leaves))
    return structure.unflatten([x + scale * jr.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_logged_of_a_move_is_what_happened(precision):
    """In one program, where XLA would gladly go on with what it has not rounded yet."""
    start = eqx.nn.MLP(8, 4, 32, 1, activation=jnp.tanh, key=jr.key(0))
    online, teacher = perturbed(eqx.filter(start, eqx.is_array), 0.1, 1), init_ema(start, precision)
    teacher = eqx.filter(teacher, eqx.is_array)
    moved, metrics = jax.jit(ema_update)(teacher, online, jnp.float32(0.999))
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(precision)}
    new, before, after = flat(online), flat(teacher), flat(moved)
    distance = np.linalg.norm(new - before)
    expected = {
        "ema/relative_distance": distance / np.linalg.norm(new),
        "ema/update_norm": np.linalg.norm(after - before),
        "ema/expected_update_norm": (1 - np.float64(np.float32(0.999))) * distance,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    apart = abs(float(metrics["ema/update_norm"] / metrics["ema/expected_update_norm"]) - 1)
    assert apart < 1e-3 if precision == "float32" else apart > 0.05


def test_what_would_freeze_the_teacher_is_refused():
    with pytest.raises(UserError, match=r"method\.ema\.schedule_stretch=0"):
        EMAConfig(schedule_stretch=0.0)
