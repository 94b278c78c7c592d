"""The Pallas kernel of attention in interpret mode against `kernels.attention`, and its lowering for a GPU."""

import importlib
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.nn import kernels
from jepax.nn.transformer import PLAIN

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
pallas = importlib.import_module("pallas_attention")
Tiles, pallas_attention = pallas.Tiles, pallas.pallas_attention
pytestmark = pytest.mark.long

SMALL = {"forward": Tiles(16, 32, 4), "backward": Tiles(32, 16, 8)}


def normal(i, *shape, dtype=jnp.float32):
    return jr.normal(jr.key(i), shape, dtype)


def run(attention, given, dtype=jnp.float32):
    """Value and gradients."""
    value, back = jax.vjp(jax.jit(attention), *(x.astype(dtype) for x in given))
    return value, *back(normal(9, *value.shape).astype(dtype))


def plain(*given, lengths=None):
    return kernels.attention(*(jnp.swapaxes(x, 1, 2) for x in given), lengths)


@pytest.mark.parametrize(
    ("queries", "tokens", "channels", "masked", "tiles"),
    [(37, 37, 32, False, {}), (21, 50, 16, True, SMALL), (40, 40, 8, False, SMALL)],
)
def test_values_and_gradients_are_those_of_attention(queries, tokens, channels, masked, tiles):
    given = normal(0, 2, queries, 2, channels), *(normal(i, 2, tokens, 2, channels) for i in (1, 2))
    lengths = jnp.array([tokens, tokens // 3], jnp.int32) if masked else None
    ours = partial(pallas_attention, lengths=lengths, **tiles)
    for got, wanted in zip(run(ours, given), run(partial(plain, lengths=lengths), given), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6 * max(1.0, float(jnp.abs(wanted).max())))


def test_padding_has_no_gradient():
    given, lengths = [normal(i, 2, 20, 2, 16) for i in range(3)], jnp.array([20, 7], jnp.int32)
    _, _, by_keys, by_values = run(partial(pallas_attention, lengths=lengths), given)
    assert not by_keys[1, 7:].any() and not by_values[1, 7:].any()
    assert by_keys[1, :7].any() and by_values[0, 7:].any()


def test_large_scores_stay_finite():
    """All scores of a row far below zero, where a padded key's would be the largest."""
    q, k = jnp.full((1, 5, 1, 16), 20.0), jnp.full((1, 5, 1, 16), -20.0)
    assert all(jnp.isfinite(x).all() for x in run(partial(pallas_attention), (q, k, normal(0, *q.shape))))


def test_bfloat16_is_nearly_float32():
    given = [normal(i, 2, 50, 3, 32).astype(jnp.bfloat16) for i in range(3)]
    ours = run(partial(pallas_attention), given, jnp.bfloat16)
    for got, wanted in zip(ours, run(plain, given), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(got.astype(jnp.float32) - wanted) <= 0.015 * np.linalg.norm(wanted)


def test_self_attention_can_run_it(monkeypatch):
    monkeypatch.setattr(kernels, "use_cudnn", lambda dtype, channels: True)
    monkeypatch.setattr(kernels, "cudnn_attention", pallas_attention)
    given = normal(0, 2, 7, 12), normal(1, 12, 36), normal(2, 36)
    sizes = {"num_heads": 3, "num_queries": 4}
    expected = PLAIN.self_attention(*given, **sizes)
    np.testing.assert_allclose(kernels.self_attention(*given, **sizes), expected, rtol=1e-4)


def h200():
    """The GPU that newer versions of JAX must know to lower for it; before 0.11 they assume a Hopper."""
    if jax.__version_info__ < (0, 11):
        return nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize(("queries", "tokens", "channels"), [(50, 50, 64), (196, 196, 64), (40, 90, 32)])
def test_it_lowers_for_a_gpu(queries, tokens, channels, monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(pallas, "on_gpu", lambda: True)
    shapes = [jax.ShapeDtypeStruct((2, n, 12, channels), jnp.bfloat16) for n in (queries, tokens, tokens)]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    program = jax.jit(
        lambda q, k, v, n: jax.vjp(lambda *x: pallas_attention(*x, n), q, k, v)[1](q.reshape(*q.shape[:2], -1))
    )
    with warnings.catch_warnings(), h200():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX 0.11: of Pallas for Triton
        text = program.trace(*shapes, lengths).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2
