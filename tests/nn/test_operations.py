"""Operations and their own gradients, against JAX's of the plain formulas, and what they keep."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from jepax.nn.blocks import Block
from jepax.nn.operations import across, attend, gelu, layer_norm

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def plain_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def plain_layer_norm(x, weight, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6) * weight + bias


def plain_attention(query, keys, values, valid=None):
    scores = jnp.einsum("bhqc,bhkc->bhqk", query, keys) / math.sqrt(query.shape[-1])
    if valid is not None:
        scores = jnp.where(valid[:, None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bhkc->bqhc", jax.nn.softmax(scores, axis=-1), values)
    return mixed.reshape(*mixed.shape[:2], -1)


def normal(i, *shape):
    return 2.0 * jr.normal(jr.key(i), shape)


VALID = jnp.arange(7) < jnp.array([[7], [3]])
CASES = {
    "gelu": (gelu, plain_gelu, (normal(0, 3, 5),)),
    "layer norm": (layer_norm, plain_layer_norm, (normal(0, 2, 3, 8) + 1.0, normal(1, 8), normal(2, 8))),
    "attention": (attend, plain_attention, tuple(normal(i, 2, 3, 7, 4) for i in range(3))),
    "attention of the last": (
        attend,
        plain_attention,
        (normal(0, 2, 3, 2, 4), *(normal(i, 2, 3, 7, 4) for i in (1, 2))),
    ),
    "masked attention": (
        lambda *x: attend(*x, VALID),
        lambda *x: plain_attention(*x, VALID),
        tuple(normal(i, 2, 3, 7, 4) for i in range(3)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_formula(name):
    ours, plain, arguments = CASES[name]
    value, back = jax.vjp(jax.jit(ours), *arguments)
    expected, plainly = jax.vjp(jax.jit(plain), *arguments)
    np.testing.assert_allclose(value, expected, **CLOSE)
    gradient = normal(9, *value.shape)
    for got, wanted in zip(back(gradient), plainly(gradient), strict=True):
        np.testing.assert_allclose(got, wanted, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_gradients_keep_the_type_and_are_near(name):
    """Eight bits, and a difference in the softmax's gradient: 0.5 to 3.3%."""
    ours, _, arguments = CASES[name]
    first, *rest = arguments
    half = [first.astype(jnp.bfloat16), *(x.astype(jnp.bfloat16) if "attention" in name else x for x in rest)]
    value, back = jax.vjp(ours, *half)
    _, widely = jax.vjp(ours, *(x.astype(jnp.float32) for x in half))
    gradient = normal(9, *value.shape).astype(jnp.bfloat16)
    for got, wanted, given in zip(back(gradient), widely(gradient.astype(jnp.float32)), half, strict=True):
        assert got.dtype == given.dtype
        assert np.linalg.norm(got - wanted) <= 0.04 * np.linalg.norm(wanted)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
@pytest.mark.parametrize(("m", "n"), [(3, 7), (7, 3), (4, 4)])
def test_products_across_are_those_of_the_transpose(shape, m, n):
    x, y = (jr.normal(jr.key(i), (*shape, width)) for i, width in enumerate((m, n)))
    np.testing.assert_allclose(across(x, y), jnp.einsum("...rm,...rn->...mn", x, y), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_block_are_those_of_finite_differences():
    """All of its own rules for gradients: of products, norms, GELU and attention."""
    block = Block(8, 2, 16, std=None, key=jr.key(0))
    x = jr.normal(jr.key(1), (2, 5, 8))

    applied = jax.jit(lambda block, x: block(x, last=3))
    check_grads(applied, (block, x), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_a_block_keeps_no_more_than_its_gradient_needs():
    """Of each token: what both norms were given and gave, q, k, v, the mixed values (twice: one array once compiled),
    the hidden layer before and after GELU (17 widths), attention's weights and their sums, and two numbers by norm."""
    batch, tokens, dim, heads = 2, 24, 32, 4
    block = Block(dim, heads, 4 * dim, std=None, key=jr.key(0))
    _, back = jax.vjp(lambda x, block: block(x), jr.normal(jr.key(1), (batch, tokens, dim)), block)
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(back)}.values()
    numbers = sum(
        leaf.size for leaf in kept if batch * tokens <= leaf.size and leaf.shape[0] in (batch, batch * tokens)
    )
    assert numbers == batch * tokens * (17 * dim + heads * tokens + heads + 4)
