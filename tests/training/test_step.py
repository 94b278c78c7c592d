"""What a training step takes; what it gives is held by the guard's tests, the trajectory's and the contracts."""

import equinox as eqx
import jax.random as jr
import pytest

from jepax.training.config import setup_data_and_optimizer
from jepax.training.step import init_state
from tests.contracts.shrink import shrunk


def test_a_method_that_holds_no_array_is_refused_by_the_fields_name():
    config = shrunk("ijepa_fashion_mnist")
    _, optimizer = setup_data_and_optimizer(config)
    method = config.method.build(total_steps=1, key=jr.key(0))
    named = eqx.tree_at(lambda m: m.predictor.mask_token, method, "token")
    with pytest.raises(TypeError, match=r"IJEPA\.predictor\.mask_token is 'token', no array: mark it eqx.field"):
        init_state(named, optimizer)
