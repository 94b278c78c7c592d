"""The transformer block and stacks of it, over the whole batch.

These modules take the batch, not one image to be `vmap`ped: on two CPU cores `vmap` through attention cost 1.5 to 1.9
times, and linear layers on three dimensions 1.6 times, because the batch must reach the matrix products as one.
"""

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.costs import counting
from jepax.nn.operations import MIXED, attend, attend_fused, gelu, is_fused, layer_norm, product, row_major
from jepax.sharding import gathered

Remat = Literal["none", "dots", "full"]
PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(MIXED)
)
"""What `dots` keeps: products with weights, and what attention gives; no scores, of which there are tokens squared."""


def init_weight(key: PRNGKeyArray, shape: tuple[int, ...], std: float | None) -> Float[Array, "..."]:
    """Normal of deviation `std`, truncated at +-2 absolute as published; `None` takes 1 / sqrt(fan in)."""
    std = 1.0 / math.sqrt(shape[0]) if std is None else std
    bound = 2.0 / std
    return std * jr.truncated_normal(key, -bound, bound, shape)


def affine(x: Array, weight: Array, bias: Array | None) -> Array:
    """x W + b on the last axis, as one matrix product over all leading axes, in the weight's dtype."""
    mapped = product(x.reshape(-1, x.shape[-1]).astype(weight.dtype), weight)
    return (mapped if bias is None else mapped + bias).reshape(*x.shape[:-1], -1)


class Linear(eqx.Module):
    """y = x W + b, or x W without a bias."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, "outputs"] | None

    def __init__(self, inputs: int, outputs: int, *, std: float | None, bias: bool = True, key: PRNGKeyArray):
        self.weight = init_weight(key, (inputs, outputs), std)
        self.bias = jnp.zeros((outputs,)) if bias else None

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return affine(x, self.weight, self.bias)


class LayerNorm(eqx.Module):
    """LayerNorm with weight and bias; statistics in float32, epsilon 1e-6."""

    weight: Float[Array, "dim"]
    bias: Float[Array, "dim"]

    def __init__(self, dim: int):
        self.weight = jnp.ones((dim,))
        self.bias = jnp.zeros((dim,))

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return layer_norm(x, self.weight, self.bias)


class Attention(eqx.Module):
    """Multi-head self-attention."""

    qkv: Linear
    project: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, dim: int, heads: int, *, std: float | None, key: PRNGKeyArray):
        key_qkv, key_project = jr.split(key)
        self.qkv = Linear(dim, 3 * dim, std=std, key=key_qkv)
        self.project = Linear(dim, dim, std=std, key=key_project)
        self.heads = heads

    def _split(self, x: Array, parts: int) -> Array:
        """(batch, tokens, parts * dim) as (parts, batch, heads, tokens, channels): one copy, batched products."""
        return x.reshape(*x.shape[:2], parts, self.heads, -1).transpose(2, 0, 3, 1, 4)

    def _projections(self, x: Array, last: int) -> tuple[Array, Array, Array]:
        """Queries of the `last` tokens, keys and values of all, each (batch, heads, tokens, channels)."""
        _, tokens, dim = x.shape
        if last == tokens:
            return tuple(self._split(self.qkv(x), 3))
        weight, bias = self.qkv.weight, self.qkv.bias
        query = affine(x[:, tokens - last :], weight[:, :dim], bias[:dim])
        return self._split(query, 1)[0], *self._split(affine(x, weight[:, dim:], bias[dim:]), 2)

    def _apart(self, x: Array, last: int) -> list[Array]:
        """`_projections` as (batch, tokens, heads, channels), by a product each: slices of one would be copied."""
        weights, biases = (jnp.split(part, 3, axis=-1) for part in (self.qkv.weight, self.qkv.bias))
        given = (x[:, x.shape[1] - last :], x, x)
        mapped = [affine(*each) for each in zip(given, weights, biases, strict=True)]
        return [y.reshape(*y.shape[:2], self.heads, -1) for y in mapped]

    def __call__(
        self, x: Float[Array, "batch tokens dim"], lengths: Int[Array, "batch"] | None = None, *, last: int
    ) -> Float[Array, "batch last dim"]:
        """`attend` by each head, and a linear layer on all of them; only the first `lengths` tokens are attended to."""
        if is_fused(self.qkv.weight.dtype, x.shape[2] // self.heads):
            return self.project(attend_fused(*self._apart(x, last), lengths))
        return self.project(attend(*self._projections(x, last), lengths))


class MLP(eqx.Module):
    """Two linear layers with an exact GELU between them."""

    expand: Linear
    contract: Linear

    def __init__(self, dim: int, hidden: int, *, std: float | None, key: PRNGKeyArray):
        key_expand, key_contract = jr.split(key)
        self.expand = Linear(dim, hidden, std=std, key=key_expand)
        self.contract = Linear(hidden, dim, std=std, key=key_contract)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.contract(gelu(self.expand(x)))


class Block(eqx.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    norm1: LayerNorm
    attention: Attention
    norm2: LayerNorm
    mlp: MLP

    def __init__(self, dim: int, heads: int, hidden: int, *, std: float | None, key: PRNGKeyArray):
        key_attention, key_mlp = jr.split(key)
        self.norm1 = LayerNorm(dim)
        self.attention = Attention(dim, heads, std=std, key=key_attention)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, hidden, std=std, key=key_mlp)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        lengths: Int[Array, "batch"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Array, "batch last dim"]:
        """Only the `last` tokens are computed (all of them by default); every token is attended to."""
        last = x.shape[1] if last is None else last
        attended = self.attention(self.norm1(x), lengths, last=last)
        x = row_major(x[:, x.shape[1] - last :] + attended)
        return row_major(x + self.mlp(self.norm2(x)))


def _rescaled(blocks: Block, depth: int) -> Block:
    """Divides the output projections of layer l = 1..depth by sqrt(2 l), as published.

    Differs from the reference: the released code undoes this by a second initialisation; here it holds.
    """
    divisor = jnp.sqrt(2.0 * jnp.arange(1, depth + 1))[:, None, None]
    return eqx.tree_at(
        lambda b: (b.attention.project.weight, b.mlp.contract.weight), blocks, replace_fn=lambda w: w / divisor
    )


class Stack(eqx.Module):
    """`depth` blocks held as one block whose arrays carry a leading `layers` axis."""

    blocks: Block
    depth: int = eqx.field(static=True)
    scan: bool = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        *,
        std: float | None,
        scan: bool,
        remat: Remat,
        key: PRNGKeyArray,
    ):
        make = eqx.filter_vmap(lambda k: Block(dim, heads, hidden, std=std, key=k))
        self.blocks = _rescaled(make(jr.split(key, depth)), depth)
        self.depth, self.scan, self.remat = depth, scan, remat

    def _apply(self, block: Block, x: Array, lengths: Array | None, last: int | None) -> Array:
        def call(block: Block, x: Array, lengths: Array | None) -> Array:
            return gathered(block)(x, lengths, last=last)

        if self.remat == "none" or counting():
            return call(block, x, lengths)
        return eqx.filter_checkpoint(call, policy=PRODUCTS if self.remat == "dots" else None)(block, x, lengths)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        lengths: Int[Array, "batch"] | None = None,
        *,
        outputs: int = 1,
        last: int | None = None,
    ) -> tuple[Float[Array, "batch _ dim"], ...]:
        """The outputs of the last `outputs` layers, first to last; in the last layer only the `last` tokens."""
        first, kept = self.depth - max(outputs, 1), []
        if last is not None:
            first = min(first, self.depth - 1)
        first = max(first, 0)
        if self.scan and first:
            x = self._scanned(x, lengths, first)
        layers = self._unstacked()
        for layer in range(first if self.scan else 0, self.depth):
            block = layers[layer]
            x = self._apply(block, x, lengths, last if layer == self.depth - 1 else None)
            if layer >= self.depth - outputs:
                kept.append(x)
        return tuple(kept)

    def _unstacked(self) -> list[Block]:
        """One block per layer. By `lax.split`, whose gradient is one concatenation; that of slices is a sum of pads."""

        def parts(leaf: Array) -> list[Array]:
            return [jnp.squeeze(part, 0) for part in lax.split(leaf, (1,) * self.depth)]

        leaves, tree = jax.tree.flatten(self.blocks)
        return [jax.tree.unflatten(tree, layer) for layer in zip(*map(parts, leaves), strict=True)]

    def _scanned(self, x: Array, lengths: Array | None, count: int) -> Array:
        def step(x: Array, block: Block) -> tuple[Array, None]:
            return self._apply(block, x, lengths, None), None

        return lax.scan(step, x, jax.tree.map(lambda leaf: leaf[:count], self.blocks))[0]
