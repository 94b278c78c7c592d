"""Blocks and stacks: forms that must agree, initialisation as published, and what padding must not do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jepax import costs
from jepax.nn.blocks import Attention, LayerNorm, Stack
from jepax.nn.operations import gelu, normalise

DIM, HEADS, TOKENS = 16, 2, 7


def stack(depth=3, *, scan=False, remat="none", std=None, dim=DIM):
    return Stack(dim, depth, HEADS, 4 * dim, std=std, scan=scan, remat=remat, key=jr.key(0))


@pytest.fixture
def tokens():
    return jr.normal(jr.key(1), (2, TOKENS, DIM))


def test_attention_is_softmax_attention(tokens):
    attention = Attention(DIM, HEADS, std=None, key=jr.key(0))
    query, keys, values = np.split(np.asarray(attention.qkv(tokens), np.float64), 3, axis=-1)

    def heads(x):
        return x.reshape(2, TOKENS, HEADS, -1).transpose(0, 2, 1, 3)

    scores = heads(query) @ heads(keys).transpose(0, 1, 3, 2) / np.sqrt(DIM // HEADS)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = (weights @ heads(values)).transpose(0, 2, 1, 3).reshape(2, TOKENS, DIM)
    expected = mixed @ np.asarray(attention.project.weight) + np.asarray(attention.project.bias)
    np.testing.assert_allclose(attention(tokens, last=TOKENS), expected, atol=1e-5)


def test_attention_survives_large_scores(tokens):
    attention = Attention(DIM, HEADS, std=30.0, key=jr.key(0))
    assert jnp.isfinite(attention(tokens, last=TOKENS)).all()


@pytest.mark.parametrize("last", [1, 3, TOKENS])
def test_only_the_last_tokens_are_computed_and_they_are_the_same(tokens, last):
    whole = stack()(tokens)[0]
    part = stack()(tokens, last=last)[0]
    assert part.shape == (2, last, DIM)
    np.testing.assert_allclose(part, whole[:, -last:], atol=1e-5)


def test_tokens_beyond_the_length_change_nothing(tokens):
    changed = jnp.where(jnp.arange(TOKENS)[:, None] < 5, tokens, 100.0)
    masked = [stack()(x, jnp.full(2, 5))[0][:, :5] for x in (tokens, changed)]
    np.testing.assert_array_equal(*masked)
    np.testing.assert_allclose(masked[0], stack()(tokens[:, :5])[0], atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_every_execution_computes_the_same(tokens, scan, remat, outputs):
    def run(s, x):
        return jnp.stack(s(x, outputs=outputs))

    plain, other = stack(), stack(scan=scan, remat=remat)
    np.testing.assert_allclose(run(other, tokens), run(plain, tokens), atol=1e-5)

    def gradients(s):
        grads = eqx.filter_jit(eqx.filter_grad(lambda s: jnp.sum(run(s, tokens) ** 2)))(s)
        return jax.tree.leaves(grads)

    for ours, expected in zip(gradients(other), gradients(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-3 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(("remat", "widths"), [("dots", 10), ("full", 1)])
def test_rematerialisation_keeps_no_more_than_it_says(tokens, remat, widths):
    """dots: what a block is given, queries, keys, values, what attention gives, and what two products with weights
    give, of one width and of four; no scores, of which there are tokens squared."""
    _, back = jax.vjp(lambda x, s: s(x)[0], tokens, stack(depth=1, remat=remat))
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(back)}.values()
    assert sum(leaf.size for leaf in kept if leaf.shape[0] in (2, 2 * TOKENS)) == 2 * TOKENS * widths * DIM


def test_arithmetic_is_counted_once_however_blocks_are_executed(tokens):
    counts = {
        costs.flops(jax.grad(lambda s, x: jnp.sum(s(x)[0] ** 2)), stack(scan=scan, remat=remat), tokens)
        for scan in (False, True)
        for remat in ("none", "dots", "full")
    }
    assert len(counts) == 1 and min(counts) > 0


def test_the_form_for_gpus_moves_no_activations_between_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    assert mesh.size > 1
    x = jax.device_put(jnp.ones((2 * mesh.size, TOKENS, DIM)), NamedSharding(mesh, PartitionSpec("data")))
    blocks = jax.device_put(stack(), NamedSharding(mesh, PartitionSpec()))
    program = jax.jit(lambda s, x: jax.grad(lambda s: jnp.sum(s(x)[0] ** 2))(s)).lower(blocks, x).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program


def test_intermediate_layers_are_those_of_shallower_stacks(tokens):
    deep = stack(3)
    outputs = deep(tokens, outputs=3)
    assert len(outputs) == 3
    for depth in (1, 2):
        first = jax.tree.map(lambda x, depth=depth: x[:depth], deep.blocks)
        shallow = eqx.tree_at(lambda s: s.blocks, stack(depth), first)
        np.testing.assert_allclose(outputs[depth - 1], shallow(tokens)[0], atol=1e-5)


def test_initialisation_is_as_published():
    blocks = stack(depth=4, std=0.02, dim=64).blocks
    assert abs(float(blocks.attention.qkv.weight.std()) - 0.02) < 1e-3
    for weight in (blocks.attention.project.weight, blocks.mlp.contract.weight):
        expected = 0.02 / np.sqrt(2 * np.arange(1, 5))  # the rescale holds, whatever comes after it
        np.testing.assert_allclose(weight.std((1, 2)), expected, rtol=0.05)
    for bias in (blocks.attention.qkv.bias, blocks.mlp.expand.bias, blocks.norm1.bias):
        assert not bias.any()
    assert (blocks.norm2.weight == 1).all()


def test_every_layer_draws_its_own_weights():
    weight = stack(depth=3).blocks.attention.qkv.weight
    assert jnp.abs(weight[0] - weight[1]).max() > 0.01


def test_gelu_is_exact():
    x = jnp.linspace(-6.0, 6.0, 101)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)


def test_norms_use_float32_statistics_and_keep_the_dtype():
    x = (jr.normal(jr.key(0), (4, 64)) + 100.0).astype(jnp.bfloat16)
    assert LayerNorm(64)(x).dtype == jnp.bfloat16
    normal = normalise(x)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(normal.mean(-1), 0.0, atol=1e-4)
    np.testing.assert_allclose(normal.std(-1), 1.0, atol=1e-3)
