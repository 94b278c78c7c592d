"""Operations and their own gradients, against JAX's of the plain formulas, and what they keep."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from jepax.nn import operations
from jepax.nn.blocks import Attention, Block
from jepax.nn.operations import across, attend, attend_fused, gelu, layer_norm

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def plain_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def plain_layer_norm(x, weight, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6) * weight + bias


def plain_attention(query, keys, values, lengths=None):
    scores = jnp.einsum("bhqc,bhkc->bhqk", query, keys) / math.sqrt(query.shape[-1])
    if lengths is not None:
        scores = jnp.where(jnp.arange(keys.shape[2]) < lengths[:, None, None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bhkc->bqhc", jax.nn.softmax(scores, axis=-1), values)
    return mixed.reshape(*mixed.shape[:2], -1)


def normal(i, *shape):
    return 2.0 * jr.normal(jr.key(i), shape)


LENGTHS = jnp.array([7, 3])
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
        lambda *x: attend(*x, LENGTHS),
        lambda *x: plain_attention(*x, LENGTHS),
        tuple(normal(i, 2, 3, 7, 4) for i in range(3)),
    ),
}


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """The forms that each takes, on the CPU at hand."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_formula(name, backend):
    ours, plain, arguments = CASES[name]
    value, back = jax.vjp(jax.jit(lambda *x: ours(*x)), *arguments)
    expected, plainly = jax.vjp(jax.jit(plain), *arguments)
    np.testing.assert_allclose(value, expected, **CLOSE)
    gradient = normal(9, *value.shape)
    for got, wanted in zip(back(gradient), plainly(gradient), strict=True):
        np.testing.assert_allclose(got, wanted, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_gradients_keep_the_type_and_are_near(name, backend):
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


def test_the_distribution_of_16_bits_is_near_and_ends_at_0_and_1(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.linspace(-8.0, 8.0, 4001)
    near = operations._cumulative(x, jnp.bfloat16(0))
    assert jnp.abs(near - jax.scipy.stats.norm.cdf(x)).max() < 4e-5
    np.testing.assert_allclose(
        near[jnp.abs(x) > operations.EDGE], jnp.round(near)[jnp.abs(x) > operations.EDGE], atol=1e-6
    )
    wide = jnp.array([-1e4, 1e4, jnp.inf, jnp.nan], jnp.bfloat16)
    np.testing.assert_allclose(gelu(wide).astype(jnp.float32), [0.0, 1e4, jnp.inf, jnp.nan], atol=0.01, rtol=0.01)


@pytest.mark.parametrize(("last", "tokens"), [(8, 8), (4, 8), (7, 7), (3, 8), (4, 7)])
@pytest.mark.parametrize("lengths", [None, jnp.array([7, 3])])
def test_fused_attention_is_attention_also_of_odd_numbers_of_tokens(last, tokens, lengths):
    """As the GPU's kernel is called, here with JAX's plain one in its place."""
    given = normal(0, 2, last, 3, 4), *(normal(i, 2, tokens, 3, 4) for i in (1, 2))

    def plain(*x):
        return attend(*(jnp.swapaxes(each, 1, 2) for each in x), lengths)

    np.testing.assert_allclose(attend_fused(*given, lengths, by="xla"), plain(*given), **CLOSE)
    gradients = [
        jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2))(*given)
        for f in (lambda *x: attend_fused(*x, lengths, by="xla"), plain)
    ]
    for ours, expected in zip(*gradients, strict=True):
        assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("last", [2, 5])
def test_products_of_their_own_give_the_same_queries_keys_and_values(last):
    attention, x = Attention(12, 3, std=None, key=jr.key(0)), normal(1, 2, 5, 12)
    for apart, joined in zip(attention._apart(x, last), attention._projections(x, last), strict=True):
        np.testing.assert_allclose(jnp.swapaxes(apart, 1, 2), joined, **CLOSE)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("last", "tokens", "channels"), [(196, 196, 64), (40, 90, 32), (69, 69, 80), (72, 141, 24)])
def test_cudnn_is_nearer_to_float32_than_our_attention_of_16_bits(last, tokens, channels, masked):
    lengths = jnp.array([tokens, tokens - 1, tokens // 2, 3]) if masked else None
    given = [normal(0, 4, last, 4, channels), *(normal(i, 4, tokens, 4, channels) for i in (1, 2))]

    def plain(*x):
        return attend(*(jnp.swapaxes(each, 1, 2) for each in x), lengths)

    def run(function, dtype):
        value, back = jax.vjp(function, *(x.astype(dtype) for x in given))
        return value, *back(normal(9, *value.shape).astype(dtype))

    with jax.default_matmul_precision("highest"):
        exact = run(plain, jnp.float32)
    fused = run(lambda *x: attend_fused(*x, lengths), jnp.bfloat16)
    for got, ours, wanted in zip(fused, run(plain, jnp.bfloat16), exact, strict=True):
        assert jnp.linalg.norm(got - wanted) <= 1.1 * jnp.linalg.norm(ours - wanted)


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
