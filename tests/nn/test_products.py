"""Products and their own gradients."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from jepax.nn.blocks import Block
from jepax.nn.products import across


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
@pytest.mark.parametrize(("m", "n"), [(3, 7), (7, 3), (4, 4)])
def test_products_across_are_those_of_the_transpose(shape, m, n):
    x, y = (jr.normal(jr.key(i), (*shape, width)) for i, width in enumerate((m, n)))
    np.testing.assert_allclose(across(x, y), jnp.einsum("...rm,...rn->...mn", x, y), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_block_are_those_of_finite_differences():
    """All of its own rules for gradients: of products, scores, and mixed values."""
    block = Block(8, 2, 16, std=None, key=jr.key(0))
    x = jr.normal(jr.key(1), (2, 5, 8))

    applied = jax.jit(lambda block, x: block(x, last=3))
    check_grads(applied, (block, x), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
