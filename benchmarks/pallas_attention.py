"""Attention of short sequences on a GPU, in Pallas: one program for each head of each sequence.

All scores of a row are in registers: no running maximum as in FlashAttention (Dao et al. 2022, arXiv:2205.14135). An
experiment for one device: `attention_kernels.py` measures it. JAX 0.11 deprecates Pallas for Triton.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jepax.nn.kernels import ATTN_OUT, Lengths, on_gpu

LOG2_E = math.log2(math.e)  # exponentials are powers of 2, for which GPUs have an instruction


class Tiles(NamedTuple):
    """Queries and keys of a tile, powers of two from 16 on. Hopper's fast products need 64 rows and four warps."""

    queries: int
    keys: int
    num_warps: int


BEST: dict[tuple[int, int, int], tuple[Tiles, Tiles]] = {(90, 90, 32): (Tiles(128, 32, 8), Tiles(64, 128, 4))}
"""The fastest forward and backward of so many queries, tokens and channels, where they were measured."""


def pallas_attention(
    q: Float[Array, "batch queries heads channels"],
    k: Float[Array, "batch tokens heads channels"],
    v: Float[Array, "batch tokens heads channels"],
    lengths: Lengths = None,
    *,
    forward: Tiles | None = None,
    backward: Tiles | None = None,
) -> Float[Array, "batch queries heads*channels"]:
    """`kernels.attention` with heads after tokens; channels are a power of 2. Interpreted without a GPU."""
    tiles = Tiles(64, min(max(pl.next_power_of_2(k.shape[1]), 16), 128), 4 if k.shape[1] <= 128 else 8)
    best = BEST.get((q.shape[1], k.shape[1], k.shape[3]), (tiles, tiles))
    return _attention(q, k, v, lengths, forward or best[0], backward or best[1]).reshape(*q.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, lengths: Lengths, forward: Tiles, _: Tiles) -> Array:
    return _call(_forward_kernel, (lengths, q, k, v), [q], forward)[0]


def _attention_forward(q: Array, k: Array, v: Array, lengths: Lengths, forward: Tiles, _: Tiles) -> tuple[Array, Any]:
    """Saves the logarithm of the sum of each row, besides the arguments and the result."""
    sums = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    out, sums = (checkpoint_name(x, ATTN_OUT) for x in _call(_forward_kernel, (lengths, q, k, v), [q, sums], forward))
    return out, (lengths, q, k, v, out, sums)


def _attention_backward(_: Tiles, backward: Tiles, residuals: tuple[Any, ...], gradient: Array) -> tuple[Any, ...]:
    return *_call(_backward_kernel, (*residuals, gradient), list(residuals[1:4]), backward), None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(kernel: Callable[..., None], given: tuple[Any, ...], results: list[Any], tiles: Tiles) -> Sequence[Array]:
    """Run the kernel for each head of each sequence, on padded blocks (tokens, channels) and (tokens,)."""

    def block(x: Any) -> pl.BlockSpec | None:
        if x is None or x.ndim == 1:  # lengths
            return None if x is None else pl.BlockSpec((1,), lambda head, i: (i,))
        rows = max(pl.next_power_of_2(x.shape[2 if x.ndim == 3 else 1]), tiles.queries, tiles.keys)
        if x.ndim == 3:  # sums of rows
            return pl.BlockSpec((None, None, rows), lambda head, i: (i, head, 0))
        return pl.BlockSpec((None, rows, None, x.shape[3]), lambda head, i: (i, 0, head, 0))

    sizes = [(x.shape[1], size) for x, size in zip(given[1:3], tiles[:2], strict=True)]
    parts = [[pl.ds(start, size) for start in range(0, rows, size)] for rows, size in sizes]
    return pl.pallas_call(
        partial(kernel, sizes=[rows for rows, _ in sizes], parts=parts),
        grid=(given[1].shape[2], given[1].shape[0]),  # heads first: those of the same tokens share lines of memory
        in_specs=[block(x) for x in given],
        out_specs=[block(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=tiles.num_warps, num_stages=1),
        interpret=not on_gpu(),
    )(*given)


def _forward_kernel(lengths: Any, q: Any, k: Any, v: Any, out: Any, *sums: Any, sizes: list[int], parts: list[Any]):
    (queries, tokens), (query_parts, key_parts), slope = sizes, parts, LOG2_E / math.sqrt(q.shape[1])
    limit = tokens if lengths is None else lengths[0]
    keys, values = ([_load(x, part, tokens) for part in key_parts] for x in (k, v))
    for part in query_parts:
        query = _load(q, part, queries)
        scores = [triton.dot(query, key, trans_b=True) for key in keys]  # (queries, keys)
        masks = [_before(limit, at, (part.size, at.size), axis=1) for at in key_parts]
        scores = [x if mask is None else jnp.where(mask, x, -jnp.inf) for x, mask in zip(scores, masks, strict=True)]
        highest = slope * reduce(jnp.maximum, [jnp.max(x, axis=1) for x in scores])
        weights = [jnp.exp2(slope * x - highest[:, None]) for x in scores]
        total = sum(jnp.sum(x, axis=1) for x in weights)
        mixed = sum(triton.dot(x.astype(value.dtype), value) for x, value in zip(weights, values, strict=True))
        _store(mixed / total[:, None], out, part, queries)
        for ref in sums:  # of powers of 2, in the gradient's forward pass
            _store(highest + LOG2_E * jnp.log(total), ref, part, queries)


def _backward_kernel(*refs: Any, sizes: list[int], parts: list[Any]) -> None:
    """As `kernels._attention_backward`, of transposed weights: two of their three products take them from registers."""
    lengths, q, k, v, out, sums, gradient, by_q, by_k, by_v = refs
    (queries, tokens), (query_parts, key_parts), scale = sizes, parts, 1.0 / math.sqrt(q.shape[1])
    limit = tokens if lengths is None else lengths[0]
    keys, values = ([_load(x, part, tokens) for part in key_parts] for x in (k, v))
    by_keys, by_values = ([jnp.zeros(key.shape, jnp.float32) for key in keys] for _ in range(2))
    for part in query_parts:
        query, result, given = (_load(x, part, queries) for x in (q, out, gradient))
        dots = jnp.sum(given.astype(jnp.float32) * result.astype(jnp.float32), axis=1)
        total, by_query = _load(sums, part, queries), jnp.zeros(query.shape, jnp.float32)
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            weights = jnp.exp2(LOG2_E * scale * triton.dot(key, query, trans_b=True) - total[None])  # (keys, queries)
            if (mask := _before(limit, key_parts[i], weights.shape)) is not None:
                weights = jnp.where(mask, weights, 0.0)
            by_scores = (weights * (triton.dot(value, given, trans_b=True) - dots[None])).astype(query.dtype)
            by_values[i] += triton.dot(weights.astype(given.dtype), given)
            by_keys[i] += triton.dot(by_scores, query)
            by_query += triton.dot(by_scores, key, trans_a=True)
        _store(scale * by_query, by_q, part, queries)
    for part, by_key, by_value in zip(key_parts, by_keys, by_values, strict=True):
        _store(scale * by_key, by_k, part, tokens)
        _store(by_value, by_v, part, tokens)


def _before(limit: Any, part: Any, shape: tuple[int, ...], axis: int = 0) -> Array | None:
    """True at rows before `limit`; None: at all of the part's."""
    if isinstance(limit, int) and part.start + part.size <= limit:
        return None
    return part.start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < limit


def _load(ref: Any, part: Any, rows: int) -> Array:
    mask = _before(rows, part, (part.size, *ref.shape[1:]))
    return triton.load(ref.at[part], mask=mask, other=None if mask is None else 0.0)


def _store(x: Array, ref: Any, part: Any, rows: int) -> None:
    triton.store(ref.at[part], x.astype(ref.dtype), mask=_before(rows, part, x.shape))
