"""Blocks and stacks: forms that must agree, initialization as published, and what padding must not do."""

import dataclasses
from functools import cache
from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jepax import flops
from jepax.nn.stack import StackConfig, init_stack
from jepax.nn.transformer import FAST, PLAIN, Attention, LayerNorm, gelu, normalize
from jepax.trees import cast

DIM, HEADS, TOKENS = 16, 2, 7
TOKENS_GIVEN = jr.normal(jr.key(1), (2, TOKENS, DIM))


def stack(depth=2, *, std=None, dim=DIM, **execution):
    config = StackConfig(width=dim, depth=depth, num_heads=HEADS, init_std=std, **execution)
    return init_stack(config, key=jr.key(0))


def values_and_gradients(stack, tokens, **arguments):
    """All outputs, and the gradients of their squares by parameters and tokens, of one compiled program."""

    def outputs(inputs):
        found = inputs[0](inputs[1], **arguments)
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in found), found

    grads, found = eqx.filter_jit(eqx.filter_grad(outputs, has_aux=True))((stack, tokens))
    return list(found), jax.tree.leaves(grads)


def some_quick(combinations, quick):
    """Parameters of a test: every combination, those that are not in `quick` in the long run alone."""
    return [pytest.param(*each, marks=() if each in quick else pytest.mark.long) for each in combinations]


@pytest.fixture
def tokens():
    return TOKENS_GIVEN


@pytest.mark.parametrize("ops", [PLAIN, FAST])
def test_attention_is_softmax_attention(tokens, ops):
    attention = Attention(DIM, HEADS, std=None, key=jr.key(0))
    query, keys, values = np.split(np.asarray(attention.qkv(tokens), np.float64), 3, axis=-1)

    def heads(x):
        return x.reshape(2, TOKENS, HEADS, -1).transpose(0, 2, 1, 3)

    scores = heads(query) @ heads(keys).transpose(0, 1, 3, 2) / np.sqrt(DIM // HEADS)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = (weights @ heads(values)).transpose(0, 2, 1, 3).reshape(2, TOKENS, DIM)
    expected = mixed @ np.asarray(attention.proj.weight) + np.asarray(attention.proj.bias)
    np.testing.assert_allclose(attention(tokens, ops=ops), expected, atol=1e-5)


@pytest.mark.parametrize("ops", [PLAIN, FAST])
def test_attention_survives_large_scores(tokens, ops):
    attention = Attention(DIM, HEADS, std=30.0, key=jr.key(0))
    assert jnp.isfinite(attention(tokens, ops=ops)).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3, TOKENS])
def test_only_the_last_tokens_are_computed_and_they_are_the_same(tokens, num_queries, fast):
    everything = stack(fast=fast)(tokens)[0]
    part = stack(fast=fast)(tokens, num_queries=num_queries)[0]
    assert part.shape == (2, num_queries, DIM)
    np.testing.assert_allclose(part, everything[:, -num_queries:], atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_tokens_beyond_the_length_change_nothing(tokens, fast):
    changed = jnp.where(jnp.arange(TOKENS)[:, None] < 5, tokens, 100.0)
    masked = [stack(fast=fast)(x, jnp.full(2, 5))[0][:, :5] for x in (tokens, changed)]
    np.testing.assert_array_equal(*masked)
    np.testing.assert_allclose(masked[0], stack(fast=fast)(tokens[:, :5])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("scan", "remat", "num_outputs"),
    some_quick(
        product((False, True), ("none", "dots", "full"), (1, 2)),
        quick={(0, "full", 2), (1, "dots", 1)},
    ),
)
def test_every_execution_computes_the_same(tokens, scan, remat, num_outputs):
    """As the plain form, unrolled and without rematerialization, does: the fast form, and the plain one."""
    expected = plain_values_and_gradients(num_outputs)
    for fast in (False, True):
        other = stack(scan_layers=scan, remat=remat, fast=fast)
        assert_close(values_and_gradients(other, tokens, num_outputs=num_outputs), expected)


@pytest.mark.parametrize(
    ("num_queries", "lengths"),
    some_quick(
        product((None, 1, 3), (None, (TOKENS, 4), (5, 5))),
        quick={(None, None), (1, (TOKENS, 4)), (3, (5, 5))},
    ),
)
def test_the_fast_form_is_the_plain_form(tokens, num_queries, lengths):
    arguments = {"num_queries": num_queries, "lengths": None if lengths is None else jnp.array(lengths)}
    fast, plain = (values_and_gradients(stack(fast=fast), tokens, **arguments) for fast in (True, False))
    assert_close(fast, plain)


@pytest.mark.parametrize("num_queries", [pytest.param(None, marks=pytest.mark.long), 3])
def test_in_bfloat16_the_fast_form_is_as_near_to_float32_as_the_plain_form(tokens, num_queries):
    arguments = {"num_queries": num_queries, "lengths": jnp.array([TOKENS, 4])}

    def run(fast, dtype):
        found = values_and_gradients(cast(stack(fast=fast), dtype), tokens.astype(dtype), **arguments)
        return jax.tree.leaves(found)

    for fast, plain, exact in zip(*(run(*form) for form in FORMS), strict=True):
        assert fast.dtype == plain.dtype == jnp.bfloat16
        error, plain_error, size = (float(jnp.linalg.norm(x)) for x in (fast - exact, plain - exact, exact))
        assert error <= 1.5 * plain_error + 1e-3 * size and error <= 0.06 * size


FORMS = [(True, jnp.bfloat16), (False, jnp.bfloat16), (False, jnp.float32)]


@cache
def plain_values_and_gradients(num_outputs):
    return values_and_gradients(stack(fast=False), TOKENS_GIVEN, num_outputs=num_outputs)


def assert_close(found, expected):
    """Values to 1e-5, gradients to 1e-4 of each array's largest."""
    for value, wanted in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)
    for grad, wanted in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()) + 1e-6)


def test_the_stack_can_be_replaced_field_by_field(tokens):
    """As FSDP does: `gather` is applied to each block before it runs, also where it is computed again."""
    calls = []

    def double(block):
        calls.append(block.mlp.fc1.weight.shape)
        return jax.tree.map(lambda x: 2 * x, block)

    doubled = eqx.tree_at(lambda s: s.blocks, stack(), jax.tree.map(lambda x: 2 * x, stack().blocks))
    for scan, remat in ((False, "none"), (True, "full")):
        hooked = dataclasses.replace(stack(scan_layers=scan), gather=double, remat=remat, fast=False)
        calls.clear()
        np.testing.assert_allclose(hooked(tokens)[0], doubled(tokens)[0], atol=1e-4)
        assert set(calls) == {(DIM, 4 * DIM)} and len(calls) == 2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("remat", "widths"), [("dots", 10), ("full", 1)])
def test_rematerialization_saves_no_more_than_it_says(tokens, remat, widths, fast):
    """dots: what a block is given, queries, keys, values, what attention gives, and what two products with weights
    give, of one width and of four; no scores, of which there are tokens squared."""
    _, back = jax.vjp(lambda x, s: s(x)[0], tokens, stack(depth=1, remat=remat, fast=fast))
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(back)}.values()
    assert sum(leaf.size for leaf in kept if leaf.shape[0] in (2, 2 * TOKENS)) == 2 * TOKENS * widths * DIM


@pytest.mark.parametrize("num_queries", [None, pytest.param(3, marks=pytest.mark.long)])
def test_arithmetic_is_counted_once_however_blocks_are_executed(tokens, num_queries):
    def gradient(stack, tokens):
        return jax.grad(lambda s: jnp.sum(s(tokens, num_queries=num_queries)[0] ** 2))(stack)

    counts = {
        flops.count_flops(gradient, stack(scan_layers=scan, remat=remat, fast=fast), tokens)
        for scan in (False, True)
        for remat in ("none", "dots", "full")
        for fast in (False, True)
    }
    assert len(counts) == 1 and min(counts) > 0
    fast = flops.count_flops(
        lambda tokens: gradient(stack(), tokens), tokens
    )  # a closure's network is counted as it is
    assert counts == {fast}


def test_the_plain_form_has_no_gradients_of_its_own_and_no_barriers(tokens):
    """What autodiff makes of the plain functions, so that a change of them is a change of the gradient."""
    for fast in (False, True):
        program = str(jax.make_jaxpr(jax.grad(lambda s, fast=fast: jnp.sum(s(tokens)[0] ** 2)))(stack(fast=fast)))
        assert ("optimization_barrier" in program) is fast


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
    outputs = deep(tokens, num_outputs=3)
    assert len(outputs) == 3
    for depth in (1, 2):
        first = jax.tree.map(lambda x, depth=depth: x[:depth], deep.blocks)
        shallow = eqx.tree_at(lambda s: s.blocks, stack(depth), first)
        np.testing.assert_allclose(outputs[depth - 1], shallow(tokens)[0], atol=1e-5)


def test_initialisation_is_as_published():
    blocks = stack(depth=4, std=0.02, dim=64).blocks
    assert abs(float(blocks.attention.qkv.weight.std()) - 0.02) < 1e-3
    for weight in (blocks.attention.proj.weight, blocks.mlp.fc2.weight):
        expected = 0.02 / np.sqrt(2 * np.arange(1, 5))  # the rescale holds, whatever comes after it
        np.testing.assert_allclose(weight.std((1, 2)), expected, rtol=0.05)
    for bias in (blocks.attention.qkv.bias, blocks.mlp.fc1.bias, blocks.norm1.bias):
        assert not bias.any()
    assert (blocks.norm2.weight == 1).all()


def test_every_layer_draws_its_own_weights():
    weight = stack(depth=3).blocks.attention.qkv.weight
    assert jnp.abs(weight[0] - weight[1]).max() > 0.01


def test_gelu_is_exact():
    x = jnp.linspace(-6.0, 6.0, 101)
    for function in (gelu, FAST.gelu):
        np.testing.assert_allclose(function(x), jax.nn.gelu(x, approximate=False), atol=1e-6)


def test_norms_use_float32_statistics_and_keep_the_dtype():
    x = (jr.normal(jr.key(0), (4, 64)) + 100.0).astype(jnp.bfloat16)
    for ops in (PLAIN, FAST):
        assert LayerNorm(64)(x, ops).dtype == jnp.bfloat16
        np.testing.assert_allclose(LayerNorm(64)(x, ops).astype(jnp.float32), normalize(x), atol=0.02)
    normal = normalize(x)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(normal.mean(-1), 0.0, atol=1e-4)
    np.testing.assert_allclose(normal.std(-1), 1.0, atol=1e-3)
