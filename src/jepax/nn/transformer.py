"""The transformer in plain JAX: read this file, and change it.

Functions of arrays come first, then the modules that own their parameters; `stack.py` runs a stack of blocks.
`kernels.py` has the same functions, fast; both give the same numbers up to rounding (tests/nn/test_kernels.py). To
change the model, edit the plain function here and set `fast=False` in the config: docs/change_the_encoder.md.

Everything works on a batch of token sequences, (batch, tokens, dim), not on one image under `vmap`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.nn import kernels
from jepax.nn.kernels import ATTN_OUT, EPSILON, Lengths, Tokens

Queries = Float[Array, "batch num_queries dim"]


# ---- Plain functions of arrays ----


def linear(x: Float[Array, "*batch inputs"], weight: Array, bias: Array | None) -> Float[Array, "*batch outputs"]:
    """x W + b, in the dtype of the weight."""
    y = x.astype(weight.dtype) @ weight
    return y if bias is None else y + bias


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x in float32; float64 stays, for tests that compare to more digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalize(x: Float[Array, "*batch dim"], epsilon: float = EPSILON) -> Float[Array, "*batch dim"]:
    """LayerNorm without parameters: mean 0 and variance 1 over the last axis, in float32."""
    x = widen(x)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + epsilon)


def layer_norm(
    x: Float[Array, "*batch dim"], weight: Array, bias: Array, epsilon: float = EPSILON
) -> Float[Array, "*batch dim"]:
    """normalize(x) w + b: float32 inside, the result in the dtype of x."""
    return (normalize(x, epsilon) * weight + bias).astype(x.dtype)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU, x Phi(x) with Phi the normal distribution: float32 inside, the result in the dtype of x."""
    wide = widen(x)
    return (wide * 0.5 * (1.0 + lax.erf(wide / math.sqrt(2.0)))).astype(x.dtype)


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """x with a fraction `rate` of its numbers set to 0 and the others divided by 1 - rate; x itself without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jr.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def attention(
    q: Float[Array, "batch queries heads channels"],
    k: Float[Array, "batch tokens heads channels"],
    v: Float[Array, "batch tokens heads channels"],
    lengths: Lengths = None,
    *,
    causal: bool = False,
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch queries heads channels"]:
    """softmax(q k^T / sqrt(channels)) v for each head, the softmax in float32. Tokens from `lengths` on are ignored.

    The queries are the last tokens; if `causal`, none attends to a later token. With a key, weights are dropped out.
    """
    # How much each query attends to each token: (batch, heads, queries, tokens)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=wide) / math.sqrt(q.shape[-1])

    # Padding gets no weight, nor do later tokens.
    if lengths is not None:
        is_token = jnp.arange(k.shape[1]) < lengths[:, None]  # (batch, tokens)
        scores = jnp.where(is_token[:, None, None, :], scores, -jnp.inf)

    if causal:
        queries, tokens = scores.shape[2:]
        scores = jnp.where(jnp.tri(queries, tokens, tokens - queries, dtype=bool), scores, -jnp.inf)

    # The weighted mean of the values: (batch, queries, heads, channels)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(v.dtype)
    return jnp.einsum("bhqk,bkhc->bqhc", weights, v)


def self_attention(
    x: Tokens, weight: Array, bias: Array, lengths: Lengths = None, *, num_heads: int, num_queries: int
) -> Queries:
    """Project tokens to queries, keys and values, and attend: each of the last `num_queries` tokens to all tokens."""
    w_q, w_k, w_v = jnp.split(weight, 3, axis=1)
    b_q, b_k, b_v = jnp.split(bias, 3)

    # (batch, tokens, dim) -> (batch, tokens, heads, channels)
    def heads(y: Array) -> Array:
        return y.reshape(*y.shape[:2], num_heads, -1)

    # Rotary positions rotate q and k here, between the projection and the scores.
    q = heads(linear(x[:, -num_queries:], w_q, b_q))
    k, v = heads(linear(x, w_k, b_k)), heads(linear(x, w_v, b_v))

    # The heads are concatenated again. The name is for rematerialization: `SAVE_MATMULS` in stack.py.
    return checkpoint_name(attention(q, k, v, lengths).reshape(*q.shape[:2], -1), ATTN_OUT)


def residual(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x + y. The fast form also fixes the layout in memory."""
    return x + y


class Ops(NamedTuple):
    """The functions that a module computes with. Modules get them as an argument, so nothing switches globally."""

    linear: Callable[..., Array]
    layer_norm: Callable[..., Array]
    gelu: Callable[..., Array]
    self_attention: Callable[..., Array]
    residual: Callable[..., Array]


PLAIN = Ops(linear, layer_norm, gelu, self_attention, residual)
FAST = Ops(kernels.linear, kernels.layer_norm, kernels.gelu, kernels.self_attention, kernels.residual)


# ---- Modules: parameters, and which function they go into ----


def init_weight(key: PRNGKeyArray, shape: tuple[int, ...], std: float | None) -> Float[Array, "..."]:
    """Normal with deviation `std`, truncated at +-2 (absolute, as published); `None` means 1 / sqrt(fan in)."""
    # `truncated_normal` counts its bounds in deviations. At 0.02 they are 100: in effect nothing is truncated.
    std = 1.0 / math.sqrt(shape[0]) if std is None else std
    bound = 2.0 / std
    return std * jr.truncated_normal(key, -bound, bound, shape)


def split_key(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """`count` keys, or as many times None: an evaluation has no key."""
    return [None] * count if key is None else list(jr.split(key, count))


class Linear(eqx.Module):
    """y = x W + b, or x W without a bias."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, "outputs"] | None

    def __init__(self, inputs: int, outputs: int, *, std: float | None, bias: bool = True, key: PRNGKeyArray):
        self.weight = init_weight(key, (inputs, outputs), std)
        self.bias = jnp.zeros((outputs,)) if bias else None

    def __call__(self, x: Float[Array, "*batch inputs"], ops: Ops = PLAIN) -> Float[Array, "*batch outputs"]:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(eqx.Module):
    """LayerNorm with weight and bias; statistics in float32."""

    weight: Float[Array, "dim"]
    bias: Float[Array, "dim"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = EPSILON):
        self.weight = jnp.ones((dim,))
        self.bias = jnp.zeros((dim,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch dim"], ops: Ops = PLAIN) -> Float[Array, "*batch dim"]:
        return ops.layer_norm(x, self.weight, self.bias, self.epsilon)


class Attention(eqx.Module):
    """Multi-head self-attention, then a linear layer on the concatenated heads."""

    qkv: Linear  # (dim, 3 dim): queries, keys and values side by side
    proj: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, dim: int, num_heads: int, *, std: float | None, key: PRNGKeyArray):
        key_qkv, key_proj = jr.split(key)
        self.qkv = Linear(dim, 3 * dim, std=std, key=key_qkv)
        self.proj = Linear(dim, dim, std=std, key=key_proj)
        self.num_heads = num_heads

    def __call__(
        self, x: Tokens, lengths: Lengths = None, *, num_queries: int | None = None, ops: Ops = PLAIN
    ) -> Queries:
        # Queries come from the last tokens, keys and values from all.
        sizes = {"num_heads": self.num_heads, "num_queries": num_queries or x.shape[1]}
        return self.proj(ops.self_attention(x, self.qkv.weight, self.qkv.bias, lengths, **sizes), ops)


class MLP(eqx.Module):
    """Two linear layers with a GELU between them; with a key, dropout after the GELU and at the end."""

    fc1: Linear
    fc2: Linear

    def __init__(self, dim: int, hidden_dim: int, *, std: float | None, key: PRNGKeyArray):
        key_fc1, key_fc2 = jr.split(key)
        self.fc1 = Linear(dim, hidden_dim, std=std, key=key_fc1)
        self.fc2 = Linear(hidden_dim, dim, std=std, key=key_fc2)

    def __call__(
        self, x: Tokens, ops: Ops = PLAIN, *, dropout_rate: float = 0.0, key: PRNGKeyArray | None = None
    ) -> Tokens:
        key_hidden, key_out = split_key(key, 2)
        hidden = dropout(ops.gelu(self.fc1(x, ops)), dropout_rate, key_hidden)
        return dropout(self.fc2(hidden, ops), dropout_rate, key_out)


class Block(eqx.Module):
    """A pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    norm1: LayerNorm
    attention: Attention
    norm2: LayerNorm
    mlp: MLP

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        std: float | None,
        norm_epsilon: float = EPSILON,
        key: PRNGKeyArray,
    ):
        key_attention, key_mlp = jr.split(key)
        self.norm1 = LayerNorm(dim, norm_epsilon)
        self.attention = Attention(dim, num_heads, std=std, key=key_attention)
        self.norm2 = LayerNorm(dim, norm_epsilon)
        self.mlp = MLP(dim, hidden_dim, std=std, key=key_mlp)

    def __call__(
        self, x: Tokens, lengths: Lengths = None, *, num_queries: int | None = None, ops: Ops = PLAIN
    ) -> Queries:
        """The last `num_queries` tokens after the block (default: all), which attend to every token."""
        # Tokens exchange information: (batch, tokens, dim) -> (batch, num_queries, dim)
        attended = self.attention(self.norm1(x, ops), lengths, num_queries=num_queries, ops=ops)
        x = ops.residual(x[:, -attended.shape[1] :], attended)

        # Each token is processed on its own.
        return ops.residual(x, self.mlp(self.norm2(x, ops), ops))
