"""The rules over trees: the type says what is trained, and how a teacher moves."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.nn.transformer import Linear
from jepax.trees import EMA, cast, count_parameters, global_norm, per_layer_norms, trainable


class Pair(eqx.Module):
    online: Linear
    teacher: EMA[Linear]
    name: str = "pair"


def pair():
    return Pair(Linear(2, 3, std=None, key=jr.key(0)), EMA(Linear(2, 3, std=None, key=jr.key(1))))


def test_nothing_beneath_an_ema_is_trained():
    trained = eqx.filter(pair(), trainable(pair()))
    assert trained.online.weight is not None and trained.online.bias is not None
    assert trained.teacher.average.weight is None and trained.teacher.average.bias is None


def test_a_teacher_moves_by_its_momentum():
    both = pair()
    moved = both.teacher.update(both.online, 0.75)
    expected = 0.75 * both.teacher.average.weight + 0.25 * both.online.weight
    np.testing.assert_allclose(moved.average.weight, expected, rtol=1e-6)


def test_a_slow_teacher_does_not_stall():
    """1 - momentum = 1e-4 is far below bfloat16's epsilon; in float32 a thousand steps still move 10% of the way."""
    teacher, online = EMA(jnp.ones(())), jnp.zeros(())
    for _ in range(1000):
        teacher = teacher.update(online, 1 - 1e-4)
    np.testing.assert_allclose(teacher.average, (1 - 1e-4) ** 1000, rtol=1e-3)


def test_cast_changes_floats_alone():
    tree = cast({"float": jnp.ones(2), "int": jnp.ones(2, jnp.int32), "text": "x"}, jnp.bfloat16)
    assert tree["float"].dtype == jnp.bfloat16 and tree["int"].dtype == jnp.int32 and tree["text"] == "x"


def test_norms():
    tree = {"a": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "b": jnp.array([4.0, 2.0])}
    assert float(global_norm(tree)) == float(jnp.sqrt(29.0))
    np.testing.assert_allclose(per_layer_norms(tree), [5.0, 2.0])
    assert count_parameters(tree) == 6
