"""The schedule and the move of a teacher."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.momentum import MomentumConfig, follow, teacher_of
from jepax.types import UserError


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [0.9, 0.95, 1.0]), ("cosine", [0.9, 0.95, 1.0]), ("constant", [0.9, 0.9, 0.9])]
)
def test_schedules(shape, expected):
    config = MomentumConfig(start=0.9, final=1.0, shape=shape)
    np.testing.assert_allclose([config.at(step, 10) for step in (0, 5, 10)], expected, rtol=1e-6)


def test_a_horizon_shortens_or_lengthens_the_path():
    np.testing.assert_allclose(MomentumConfig(start=0.9, horizon=0.5).at(5, 10), 1.0, rtol=1e-6)
    np.testing.assert_allclose(MomentumConfig(start=0.9, horizon=2.0).at(10, 10), 0.95, rtol=1e-6)


def test_a_teacher_is_a_copy_that_moves_by_its_share():
    online = eqx.nn.Linear(2, 2, key=jr.key(0))
    teacher = teacher_of(online)
    assert teacher.average.weight is not online.weight
    np.testing.assert_array_equal(teacher.average.weight, online.weight)
    other = eqx.tree_at(lambda m: m.bias, online, online.bias + 2.0)
    moved, metrics = follow(teacher, other, jnp.float32(0.75))
    np.testing.assert_allclose(moved.average.bias - online.bias, 0.5, rtol=1e-5)
    np.testing.assert_array_equal(moved.average.weight, online.weight)
    np.testing.assert_allclose([metrics["momentum"], metrics["ema_step_norm"]], [0.75, 0.5 * np.sqrt(2)], rtol=1e-5)


def test_what_would_freeze_the_teacher_is_refused():
    with pytest.raises(UserError, match=r"method\.momentum\.horizon=0"):
        MomentumConfig(horizon=0.0)
