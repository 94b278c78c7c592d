"""The input of a training step; its results are in the tests of the guard, of the trajectory, and of the contracts."""

import equinox as eqx
import jax.random as jr
import pytest

from jepax.training.setup import make_setup
from jepax.training.step import init_train_state, is_log_step
from tests.contracts.shrink import shrunk


def test_a_leaf_of_a_method_that_is_no_array_is_refused_by_the_fields_name():
    config = shrunk("ijepa_fashion_mnist")
    optimizer = make_setup(config).optimizer
    method = config.method.build(total_steps=1, key=jr.key(0))
    named = eqx.tree_at(lambda m: m.predictor.mask_token, method, "token")
    with pytest.raises(TypeError, match=r"IJEPA\.predictor\.mask_token is 'token', not an array: use eqx.field"):
        init_train_state(named, optimizer)


@pytest.mark.parametrize(("every", "total", "steps"), [(2, 6, [0, 1, 3, 5]), (4, 6, [0, 3, 5]), (10, 3, [0, 2])])
def test_the_first_every_and_the_last_step_are_logged(every, total, steps):
    assert [step for step in range(total) if is_log_step(step, every, total)] == steps
