"""The functions of transformer.py, fast: the same numbers up to rounding, each with the measurement that pays for it.

On a CPU the gain is mostly memory: left to XLA, a training step stores GELU's erf, every stage of a LayerNorm and
attention's weights twice, 1.3 to 1.6 times the temporary memory. The gradients below store the operands of matrix
products, the inputs of LayerNorm and GELU, and attention's weights; the rest is recomputed, and `barrier_after` keeps
XLA from doing that early. On a GPU the gain is time. "Measured": on two CPU cores or an H200, benchmarks/, docs/log.md.

This file imports nothing of the model. A change of the model starts in transformer.py with `fast=False`.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Tokens = Float[Array, "batch tokens dim"]
Lengths = Int[Array, "batch"] | None
"""Number of real tokens in each sequence, the rest being padding at its end; None: no padding."""
EPSILON = 1e-6
"""Added to LayerNorm's variance, by default."""
ATTN_OUT = "attention output"
"""Name of attention's result, for rematerialization policies."""
PHI_CUTOFF = 4.0
"""End of the polynomial of `PHI_COEFFS`, where it is within 1e-6 of 0 (left) and 1 (right)."""
PHI_COEFFS = (
    *(3.988075721e-01, -6.606929197e-02, 9.585147721e-03, -1.022224632e-03),
    *(7.637760016e-05, -3.725416189e-06, 1.051160550e-07, -1.289396669e-09),
)
"""Phi(x) = 1/2 + x (a + b x^2 + c x^4 + ...): minimax, error 3.3e-5 for |x| <= `PHI_CUTOFF`, fitted for this file."""
CUDNN_MAX_CHANNELS, CUDNN_MIN_CAPABILITY = 128, 8.0
"""Widest head, and oldest GPU (Ampere), for which cuDNN's attention has a gradient. Source: NVIDIA's cuDNN docs."""


def on_gpu() -> bool:
    """True if programs run on GPUs, for which some functions have another form."""
    return jax.default_backend() == "gpu"


def barrier_after(gradient: Array, *residuals: Array) -> tuple[Array, ...]:
    """Its arguments, with nothing computed from the residuals before the gradient exists: else XLA merges that work
    with the same work of the forward pass, or does it early, and stores the result."""
    return lax.optimization_barrier((gradient, *residuals))


def pin_row_major(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """x, its last axis contiguous in a GPU's memory.

    Measured: a mean over tokens at a network's end makes XLA lay out all of it with tokens innermost and transpose at
    each product and norm, 5% of ViT-B/16's step. jax 0.10 gathers an array on every device to apply the constraint, so
    there it is applied on one device only.
    """
    if not on_gpu() or (jax.device_count() > 1 and jax.__version_info__ < (0, 11)):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def residual(x: Float[Array, "*batch dim"], y: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """x + y, in rows: see `pin_row_major`."""
    return pin_row_major(x + y)


# ---- Linear ----


def linear(x: Float[Array, "*batch inputs"], weight: Array, bias: Array | None) -> Float[Array, "*batch outputs"]:
    """x W + b in the dtype of the weight. Measured on CPU: products of three-dimensional arrays take 1.6 times as long
    as this one over all leading axes."""
    y = matmul(x.reshape(-1, x.shape[-1]).astype(weight.dtype), weight)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def matmul(x: Float[Array, "rows inputs"], weight: Float[Array, "inputs outputs"]) -> Float[Array, "rows outputs"]:
    """x W, whose gradient by W goes through `matmul_tn`."""
    return x @ weight


def _matmul_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = residuals
    return gradient @ weight.T, matmul_tn(x, gradient)


matmul.defvjp(lambda x, weight: (x @ weight, (x, weight)), _matmul_backward)


def matmul_tn(x: Float[Array, "*batch rows m"], y: Float[Array, "*batch rows n"]) -> Float[Array, "*batch m n"]:
    """x^T y: the gradients of weights, keys and values.

    Measured on CPU, where XLA is slow at it: a batch of small ones with x transposed first saves 7 to 30% of
    attention's value and gradient; (y^T x)^T where m > n is up to 1.5 times as fast. On other devices XLA chooses.
    """
    if jax.default_backend() != "cpu":
        return jnp.einsum("...rm,...rn->...mn", x, y)
    if x.ndim > 2:
        return lax.optimization_barrier(jnp.swapaxes(x, -1, -2)) @ y
    return lax.optimization_barrier(y.T @ x).T if x.shape[-1] > y.shape[-1] else x.T @ y


# ---- GELU ----


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU, x Phi(x), by `erf`; the gradient needs x alone. Measured on CPU: `jax.nn.gelu`'s `erfc` takes twice
    as long."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide, x.dtype)).astype(x.dtype)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    """g (Phi(x) + x phi(x)), with phi the density."""
    gradient, x = barrier_after(gradient, x)
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (1.0 / math.sqrt(2.0 * math.pi))
    return ((gradient * (_normal_cdf(wide, x.dtype) + wide * density)).astype(gradient.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _normal_cdf(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Phi(x) of the normal distribution in float32, as exact as `dtype` needs. Measured on GPU: `erf` takes almost
    twice as long as reading and writing the numbers. For 16-bit types a GPU evaluates a polynomial instead, whose error
    of 3.3e-5 is a hundredth of their resolution near 1."""
    if not on_gpu() or jnp.dtype(dtype).itemsize > 2:
        return 0.5 * (1.0 + lax.erf(x * math.sqrt(0.5)))
    x = jnp.clip(x, -PHI_CUTOFF, PHI_CUTOFF)
    return 0.5 + x * jnp.polyval(jnp.array(PHI_COEFFS[::-1]), jnp.square(x), unroll=len(PHI_COEFFS))


# ---- LayerNorm ----


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Float[Array, "*batch dim"], weight: Array, bias: Array, epsilon: float = EPSILON) -> Array:
    """n(x) w + b, n(x) of mean 0 and variance 1: float32 inside, the result in the dtype of x."""
    return _layer_norm_forward(x, weight, bias, epsilon)[0]


def _layer_norm_forward(x: Array, weight: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    """Saves x and two numbers for each row of it, where XLA would save every stage."""
    wide = x.astype(jnp.float32)
    mean, scale = _mean_and_scale(wide, epsilon)
    return ((wide - mean) * scale * weight + bias).astype(x.dtype), (x, mean, scale, weight, bias)


def _layer_norm_backward(_: float, residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    """By x: s (h - mean(h) - n mean(h n)), with h = g w, n the normalized x, and s one over its deviation."""
    *saved, weight, bias = residuals
    gradient, x, mean, scale = barrier_after(gradient, *saved)
    wide, axes = gradient.astype(jnp.float32), tuple(range(x.ndim - 1))
    normal, h = (x.astype(jnp.float32) - mean) * scale, wide * weight
    if jax.default_backend() == "cpu":  # else XLA writes out all of `scale`, once for each use
        normal, h = lax.optimization_barrier((normal, h))
    sums = _row_sums(h, h * normal) if on_gpu() else (jnp.sum(y, axis=-1, keepdims=True) for y in (h, h * normal))
    mean_h, mean_hn = (total / x.shape[-1] for total in sums)
    by_x = scale * (h - mean_h - normal * mean_hn)
    by_weight, by_bias = jnp.sum(wide * normal, axis=axes), jnp.sum(wide, axis=axes)
    return by_x.astype(x.dtype), by_weight.astype(weight.dtype), by_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _mean_and_scale(x: Array, epsilon: float) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Mean of each row and one over its deviation; on a GPU in one pass over x."""
    if not on_gpu():
        mean = jnp.mean(x, axis=-1, keepdims=True)
        return mean, lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + epsilon)
    mean, square = (total / x.shape[-1] for total in _row_sums(x, jnp.square(x)))
    return mean, lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + epsilon)


def _row_sums(*arrays: Array) -> tuple[Float[Array, "*batch 1"], ...]:
    """Sums over the last axis, in a GPU kernel of their own. Measured: fused with what follows, as XLA does by itself,
    a norm takes 1.6 times as long."""
    return lax.optimization_barrier(tuple(jnp.sum(x, axis=-1, keepdims=True) for x in arrays))


# ---- Attention ----


def self_attention(
    x: Tokens, weight: Array, bias: Array, lengths: Lengths = None, *, num_heads: int, num_queries: int
) -> Float[Array, "batch num_queries dim"]:
    """Projects tokens to queries, keys and values, and attends: each of the last `num_queries` tokens to all tokens."""
    if use_cudnn(weight.dtype, x.shape[2] // num_heads):
        return cudnn_attention(*_separate_qkv(x, weight, bias, num_heads, num_queries), lengths)
    return attention(*_joint_qkv(x, weight, bias, num_heads, num_queries), lengths)


def _joint_qkv(x: Array, weight: Array, bias: Array, num_heads: int, num_queries: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values as (batch, heads, tokens, channels), by one product where every token is a query.
    Measured on CPU: heads first by one copy, so that the products are batched, saves up to 6% of a step."""
    _, tokens, dim = x.shape

    def heads(y: Array, parts: int) -> Array:  # (batch, tokens, parts * dim) -> (parts, batch, heads, tokens, channels)
        return y.reshape(*y.shape[:2], parts, num_heads, -1).transpose(2, 0, 3, 1, 4)

    if num_queries == tokens:
        return tuple(heads(linear(x, weight, bias), 3))
    q = linear(x[:, tokens - num_queries :], weight[:, :dim], bias[:dim])
    return heads(q, 1)[0], *heads(linear(x, weight[:, dim:], bias[dim:]), 2)


def _separate_qkv(x: Array, weight: Array, bias: Array, num_heads: int, num_queries: int) -> list[Array]:
    """Queries, keys and values as (batch, tokens, heads, channels), by three products. Measured on GPU: slices of one
    product's result are copied before cuDNN reads them."""
    weights, biases = (jnp.split(part, 3, axis=-1) for part in (weight, bias))
    projected = map(linear, (x[:, x.shape[1] - num_queries :], x, x), weights, biases)
    return [y.reshape(*y.shape[:2], num_heads, -1) for y in projected]


def attention(
    q: Float[Array, "batch heads queries channels"],
    k: Float[Array, "batch heads tokens channels"],
    v: Float[Array, "batch heads tokens channels"],
    lengths: Lengths = None,
) -> Float[Array, "batch queries heads*channels"]:
    """softmax(q k^T / sqrt(channels)) v, the heads concatenated. Tokens from `lengths` on are ignored.

    The softmax is normalized after the product with the values, which touches fewer numbers. It is in float32, all
    products in the dtype of q, those of the gradient too: autodiff would compute two of a layer's largest in float32.
    """
    return _attention(q * (q.shape[-1] ** -0.5), k, v, lengths)


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, lengths: Lengths) -> Array:
    return _attention_forward(q, k, v, lengths)[0]


def _attention_forward(q: Array, k: Array, v: Array, lengths: Lengths) -> tuple[Array, tuple[Array, ...]]:
    """Saves the weights once, in the dtype of v, and the sum of each row."""
    scores = jnp.einsum("bhqc,bhkc->bhqk", q, k, preferred_element_type=jnp.float32)
    if lengths is not None:
        valid = jnp.arange(k.shape[2]) < lengths[:, None]
        scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = (weights @ v) / total.astype(v.dtype)
    out = jnp.swapaxes(out, 1, 2).reshape(q.shape[0], q.shape[2], -1)
    out = lax.optimization_barrier(out)  # one array for both of its readers: the next layer, and the gradient
    out = checkpoint_name(out, ATTN_OUT)
    return out, (q, k, v, weights, total, out)


def _attention_backward(residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    """By the scores: W / t (G V^T - d), with G the gradient, t the sum of a row's weights W, and d of G times the
    result: the derivative of the softmax and of its sum in one (Dao et al. 2022, FlashAttention, appendix B.2)."""
    gradient, q, k, v, weights, total, out = barrier_after(gradient, *residuals)
    heads = (*gradient.shape[:2], q.shape[1], -1)
    gradient, out = gradient.reshape(heads), out.reshape(heads)
    dots = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)
    gradient, dots = jnp.swapaxes(gradient, 1, 2), jnp.swapaxes(dots, 1, 2) / total
    gradient = (gradient / total).astype(v.dtype)
    by_scores = (weights * (jnp.einsum("bhqc,bhkc->bhqk", gradient, v) - dots)).astype(q.dtype)
    return by_scores @ k, matmul_tn(by_scores, q), matmul_tn(weights, gradient), None


_attention.defvjp(_attention_forward, _attention_backward)


def use_cudnn(dtype: DTypeLike, channels: int) -> bool:
    """True if cuDNN has attention as one kernel, with a gradient, on this GPU and for heads of this many channels."""
    device = jax.local_devices()[0]
    if not on_gpu() or "cuda" not in device.client.platform_version.lower():
        return False
    if float(device.compute_capability) < CUDNN_MIN_CAPABILITY:
        return False
    is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return is_half and channels % 8 == 0 and channels <= CUDNN_MAX_CHANNELS


def cudnn_attention(
    q: Float[Array, "batch queries heads channels"],
    k: Float[Array, "batch tokens heads channels"],
    v: Float[Array, "batch tokens heads channels"],
    lengths: Lengths = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch queries heads*channels"]:
    """`attention` by one cuDNN kernel, which writes no scores to memory. Requires `use_cudnn`.

    Measured: ViT-B/16's step takes 41 ms instead of 45, attention in its predictor 0.55 ms a layer instead of 1.04.
    """
    num_queries, tokens = q.shape[1], k.shape[1]
    if num_queries % 2 or tokens % 2:  # JAX has no gradient for odd numbers of tokens
        lengths = jnp.full(len(q), tokens, jnp.int32) if lengths is None else lengths
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)
    return checkpoint_name(out[:, :num_queries].reshape(len(out), num_queries, -1), ATTN_OUT)
