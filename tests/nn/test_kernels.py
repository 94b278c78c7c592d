"""The kernels and their gradients against the plain functions and theirs, and what they save."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from jepax.nn import kernels, transformer
from jepax.nn.kernels import attention, cudnn_attention, gelu, layer_norm, matmul_tn
from jepax.nn.transformer import FAST, PLAIN, Attention, Block

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def plain_attention(query, keys, values, lengths=None):
    """The plain function with the kernel's order of axes."""
    mixed = transformer.attention(*(jnp.swapaxes(x, 1, 2) for x in (query, keys, values)), lengths)
    return mixed.reshape(*mixed.shape[:2], -1)


def normal(i, *shape):
    return 2.0 * jr.normal(jr.key(i), shape)


LENGTHS = jnp.array([7, 3])
HEADS = tuple(normal(i, 2, 3, 7, 4) for i in range(3))
TOKENS = (0.5 * normal(0, 2, 7, 12), 0.15 * normal(1, 12, 36), 0.1 * normal(2, 36))


def of_tokens(num_queries, lengths=None):
    """The fast and the plain function from tokens to attention's result, of so many queries."""
    sizes = {"num_heads": 3, "num_queries": num_queries}
    return *(lambda *x, ops=ops: ops.self_attention(*x, lengths, **sizes) for ops in (FAST, PLAIN)), TOKENS


CASES = {
    "linear": (FAST.linear, PLAIN.linear, (normal(0, 3, 5, 8), normal(1, 8, 6), normal(2, 6))),
    "linear that widens": (FAST.linear, PLAIN.linear, (normal(0, 3, 5, 6), normal(1, 6, 8), normal(2, 8))),
    "residual": (FAST.residual, PLAIN.residual, (normal(0, 3, 5, 8), normal(1, 3, 5, 8))),
    "gelu": (gelu, PLAIN.gelu, (normal(0, 3, 5),)),
    "layer norm": (layer_norm, PLAIN.layer_norm, (normal(0, 2, 3, 8) + 1.0, normal(1, 8), normal(2, 8))),
    "layer norm, small epsilon": (
        partial(layer_norm, epsilon=1e-12),
        partial(PLAIN.layer_norm, epsilon=1e-12),
        (normal(0, 2, 3, 8) * 1e-3, normal(1, 8), normal(2, 8)),
    ),
    "attention": (attention, plain_attention, HEADS),
    "attention of the last": (attention, plain_attention, (normal(0, 2, 3, 2, 4), *HEADS[1:])),
    "masked attention": (lambda *x: attention(*x, LENGTHS), lambda *x: plain_attention(*x, LENGTHS), HEADS),
    "attention of tokens": of_tokens(7),
    "attention of the last tokens": of_tokens(2),
    "masked attention of tokens": of_tokens(2, LENGTHS),
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
    gradient = normal(9, *value.shape)
    pairs = zip((value, *back(gradient)), (expected, *plainly(gradient)), strict=True)
    for got, wanted in pairs:  # to some roundings of each array's largest number
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6 * max(1.0, float(jnp.abs(wanted).max())))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.long)], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_gradients_keep_the_type_and_are_near(name, backend):
    """Eight bits, and a difference in the softmax's gradient: 0.5 to 3.3%."""
    ours, _, arguments = CASES[name]
    first, *rest = arguments
    half = [first.astype(jnp.bfloat16), *(x if name == "layer norm" else x.astype(jnp.bfloat16) for x in rest)]
    value, back = jax.vjp(ours, *half)
    _, widely = jax.vjp(ours, *(x.astype(jnp.float32) for x in half))
    gradient = normal(9, *value.shape).astype(jnp.bfloat16)
    for got, wanted, given in zip(back(gradient), widely(gradient.astype(jnp.float32)), half, strict=True):
        assert got.dtype == given.dtype
        assert np.linalg.norm(got - wanted) <= 0.04 * np.linalg.norm(wanted)


def test_the_distribution_of_16_bits_is_near_and_ends_at_0_and_1(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.linspace(-8.0, 8.0, 4001)
    near = kernels._normal_cdf(x, jnp.bfloat16)
    assert jnp.abs(near - jax.scipy.stats.norm.cdf(x)).max() < 4e-5
    outside = jnp.abs(x) > kernels.PHI_CUTOFF
    np.testing.assert_allclose(near[outside], jnp.round(near)[outside], atol=1e-6)
    wide = jnp.array([-1e4, 1e4, jnp.inf, jnp.nan], jnp.bfloat16)
    np.testing.assert_allclose(gelu(wide).astype(jnp.float32), [0.0, 1e4, jnp.inf, jnp.nan], atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("num_queries", "tokens"),
    [(3, 8), *(pytest.param(*n, marks=pytest.mark.long) for n in ((8, 8), (4, 8), (7, 7), (4, 7)))],
)
@pytest.mark.parametrize("lengths", [None, jnp.array([7, 3])])
def test_fused_attention_is_attention_also_of_odd_numbers_of_tokens(num_queries, tokens, lengths):
    """As the GPU's kernel is called, here with JAX's plain one in its place."""
    given = normal(0, 2, num_queries, 3, 4), *(normal(i, 2, tokens, 3, 4) for i in (1, 2))

    def plain(*x):
        return attention(*(jnp.swapaxes(each, 1, 2) for each in x), lengths)

    np.testing.assert_allclose(cudnn_attention(*given, lengths, implementation="xla"), plain(*given), **CLOSE)
    gradients = [
        jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2))(*given)
        for f in (lambda *x: cudnn_attention(*x, lengths, implementation="xla"), plain)
    ]
    for ours, expected in zip(*gradients, strict=True):
        assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("num_queries", [2, 5])
def test_separate_products_give_the_same_queries_keys_and_values(num_queries):
    qkv, x = Attention(12, 3, std=None, key=jr.key(0)).qkv, normal(1, 2, 5, 12)
    given = (x, qkv.weight, qkv.bias, 3, num_queries)
    for separate, joint in zip(kernels._separate_qkv(*given), kernels._joint_qkv(*given), strict=True):
        np.testing.assert_allclose(jnp.swapaxes(separate, 1, 2), joint, **CLOSE)


def test_attention_of_tokens_by_cudnn_is_the_plain_one(monkeypatch):
    """Its path in `self_attention`, with JAX's own attention instead of the kernel."""
    monkeypatch.setattr(kernels, "use_cudnn", lambda dtype, channels: True)
    by_xla = partial(cudnn_attention, implementation="xla")
    monkeypatch.setattr(kernels, "cudnn_attention", by_xla)
    for fast, plain, given in (of_tokens(7), of_tokens(2, LENGTHS)):
        np.testing.assert_allclose(fast(*given), plain(*given), **CLOSE)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "tokens", "channels"), [(196, 196, 64), (40, 90, 32), (69, 69, 80), (72, 141, 24)]
)
def test_cudnn_is_nearer_to_float32_than_our_attention_of_16_bits(num_queries, tokens, channels, masked):
    lengths = jnp.array([tokens, tokens - 1, tokens // 2, 3]) if masked else None
    given = [normal(0, 4, num_queries, 4, channels), *(normal(i, 4, tokens, 4, channels) for i in (1, 2))]

    def plain(*x):
        return attention(*(jnp.swapaxes(each, 1, 2) for each in x), lengths)

    def run(function, dtype):
        value, back = jax.vjp(function, *(x.astype(dtype) for x in given))
        return value, *back(normal(9, *value.shape).astype(dtype))

    with jax.default_matmul_precision("highest"):
        exact = run(plain, jnp.float32)
    fused = run(lambda *x: cudnn_attention(*x, lengths), jnp.bfloat16)
    for got, ours, wanted in zip(fused, run(plain, jnp.bfloat16), exact, strict=True):
        assert jnp.linalg.norm(got - wanted) <= 1.1 * jnp.linalg.norm(ours - wanted)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
@pytest.mark.parametrize(("m", "n"), [(3, 7), (7, 3), (4, 4)])
def test_products_across_are_those_of_the_transpose(shape, m, n):
    x, y = (jr.normal(jr.key(i), (*shape, width)) for i, width in enumerate((m, n)))
    np.testing.assert_allclose(matmul_tn(x, y), jnp.einsum("...rm,...rn->...mn", x, y), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_block_are_those_of_finite_differences():
    """All of its own rules for gradients: of products, norms, GELU and attention."""
    block = Block(8, 2, 16, std=None, key=jr.key(0))
    x = jr.normal(jr.key(1), (2, 5, 8))

    applied = jax.jit(lambda block, x: block(x, num_queries=3, ops=FAST))
    check_grads(applied, (block, x), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_a_block_saves_no_more_than_its_gradient_needs():
    """Of each token: what both norms were given and gave, q, k, v, the mixed values (twice: one array once compiled),
    the hidden layer before and after GELU (17 widths), attention's weights and their sums, and two numbers by norm."""
    batch, tokens, dim, heads = 2, 24, 32, 4
    block = Block(dim, heads, 4 * dim, std=None, key=jr.key(0))
    _, back = jax.vjp(lambda x, block: block(x, ops=FAST), jr.normal(jr.key(1), (batch, tokens, dim)), block)
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(back)}.values()
    numbers = sum(
        leaf.size for leaf in kept if batch * tokens <= leaf.size and leaf.shape[0] in (batch, batch * tokens)
    )
    assert numbers == batch * tokens * (17 * dim + heads * tokens + heads + 4)
