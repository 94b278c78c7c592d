"""What blocks are made of, with gradients of their own: they say what a step keeps for its backward pass, and how.

Forms that differ by device compute the same; which is quicker was measured on two CPU cores and on an H200.

Left to XLA, a step on a CPU kept GELU's erf, LayerNorm's every stage, attention's weights twice, and so held 1.3 to 1.6
times the temporary memory. Kept are the operands of matrix products, what LayerNorm and GELU were given, attention's
weights, and numbers by row. The rest is computed again where it is wanted: `after` sees to it that it is not sooner.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jepax.costs import counting

EPSILON = 1e-6
MIXED = "attended"
"""Name of what attention gives, for policies of rematerialisation."""


def on_gpu() -> bool:
    """Whether programs run on GPUs, for which some operations have another form."""
    return jax.default_backend() == "gpu"


def after(gradient: Array, *kept: Array) -> tuple[Array, ...]:
    """The gradient and what was kept, so that nothing is made of the latter before the gradient is there.

    XLA would merge it with the same work of the forward pass, or do it early, and hold it until then.
    """
    return lax.optimization_barrier((gradient, *kept))


def across(x: Float[Array, "*batch rows m"], y: Float[Array, "*batch rows n"]) -> Float[Array, "*batch m n"]:
    """x^T y, the product of every weight's gradient and of attention's.

    XLA is slow at it on a CPU: in a batch of small ones x is transposed first (7 to 30% of attention's value and
    gradient), and where m > n it is taken as (y^T x)^T (up to 1.5 times as fast). Elsewhere XLA chooses.
    """
    if jax.default_backend() != "cpu":
        return jnp.einsum("...rm,...rn->...mn", x, y)
    if x.ndim > 2:
        return lax.optimization_barrier(jnp.swapaxes(x, -1, -2)) @ y
    return lax.optimization_barrier(y.T @ x).T if x.shape[-1] > y.shape[-1] else x.T @ y


@jax.custom_vjp
def product(x: Float[Array, "rows inputs"], weight: Float[Array, "inputs outputs"]) -> Float[Array, "rows outputs"]:
    """x W, whose gradient by W goes through `across`."""
    return x @ weight


def _product_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    return gradient @ weight.T, across(x, gradient)


product.defvjp(lambda x, weight: (x @ weight, (x, weight)), _product_backward)


EDGE = 4.0
"""Where `ODD` ends, within 1e-6 of 0 on the left and of 1 on the right."""
ODD = (
    *(3.988075721e-01, -6.606929197e-02, 9.585147721e-03, -1.022224632e-03),
    *(7.637760016e-05, -3.725416189e-06, 1.051160550e-07, -1.289396669e-09),
)
"""Phi(x) = 1/2 + x (a + b x^2 + c x^4 + ...): least greatest error, 3.3e-5, on |x| <= `EDGE`, fitted for this file."""


def _cumulative(x: Float[Array, "*shape"], like: Array) -> Float[Array, "*shape"]:
    """Phi(x) of the normal distribution, for numbers of the type of `like`.

    For 16 bits a GPU gets a polynomial, whose absolute error of 3.3e-5 is a hundredth of what they tell apart near 1:
    by `erf` an H200 takes almost twice as long as the numbers need to come from its memory and go back.
    """
    if not on_gpu() or like.dtype.itemsize > 2:
        return 0.5 * (1.0 + lax.erf(x * math.sqrt(0.5)))
    x = jnp.clip(x, -EDGE, EDGE)
    return 0.5 + x * jnp.polyval(jnp.array(ODD[::-1]), jnp.square(x), unroll=len(ODD))


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU, x Phi(x). Through `erf`: `jax.nn.gelu` goes through `erfc`, which takes twice the time on a CPU."""
    wide = x.astype(jnp.float32)
    return (wide * _cumulative(wide, x)).astype(x.dtype)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    """g (Phi(x) + x phi(x))."""
    gradient, x = after(gradient, x)
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (1.0 / math.sqrt(2.0 * math.pi))
    return ((gradient * (_cumulative(wide, x) + wide * density)).astype(gradient.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _statistics(x: Array) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Mean of the last axis, and one over its deviation; on a GPU in one pass over x, where float32 has the digits."""
    if not on_gpu():
        mean = jnp.mean(x, axis=-1, keepdims=True)
        return mean, lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + EPSILON)
    mean, square = (total / x.shape[-1] for total in _sums(x, jnp.square(x)))
    return mean, lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + EPSILON)


def _sums(*arrays: Array) -> tuple[Float[Array, "*batch 1"], ...]:
    """Sums over the last axis, in a kernel of their own: in one with what follows, as a GPU's XLA would have it, a norm
    takes 1.6 times as long."""
    return lax.optimization_barrier(tuple(jnp.sum(x, axis=-1, keepdims=True) for x in arrays))


def normalise(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Parameter-free LayerNorm: mean 0 and variance 1 over the last axis (epsilon 1e-6), in float32."""
    x = x.astype(jnp.float32)
    mean, scale = _statistics(x)
    return (x - mean) * scale


@jax.custom_vjp
def layer_norm(
    x: Float[Array, "*batch dim"], weight: Float[Array, "dim"], bias: Float[Array, "dim"]
) -> Float[Array, "*batch dim"]:
    """n(x) w + b with n `normalise`; float32 inside, the result in the type of x."""
    return _layer_norm_forward(x, weight, bias)[0]


def _layer_norm_forward(x: Array, weight: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    mean, scale = _statistics(wide)
    return ((wide - mean) * scale * weight + bias).astype(x.dtype), (x, mean, scale, weight, bias)


def _layer_norm_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    """By x: s (h - mean(h) - n mean(h n)) with h = g w and s one over the deviation."""
    *kept, weight, bias = kept
    gradient, x, mean, scale = after(gradient, *kept)
    wide, axes = gradient.astype(jnp.float32), tuple(range(x.ndim - 1))
    normal, by = (x.astype(jnp.float32) - mean) * scale, wide * weight
    if jax.default_backend() == "cpu":  # whose XLA else makes an array of all of `scale` for each use
        normal, by = lax.optimization_barrier((normal, by))
    sums = _sums(by, by * normal) if on_gpu() else (jnp.sum(y, axis=-1, keepdims=True) for y in (by, by * normal))
    shift, slope = (total / x.shape[-1] for total in sums)
    centred = by - shift - normal * slope
    by_weight, by_bias = jnp.sum(wide * normal, axis=axes), jnp.sum(wide, axis=axes)
    return (scale * centred).astype(x.dtype), by_weight.astype(weight.dtype), by_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def attend(
    query: Float[Array, "batch heads last channels"],
    keys: Float[Array, "batch heads tokens channels"],
    values: Float[Array, "batch heads tokens channels"],
    lengths: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch last heads*channels"]:
    """softmax(Q K^T / sqrt(channels)) V, the heads side by side; only the first `lengths` tokens are attended to.

    The softmax is normalised after the product with the values, which touches fewer numbers. Its statistics are in
    float32, all products in the operands' type, those of the gradient too: JAX's own would take float32 for two of a
    layer's largest.
    """
    return _attention(query * (query.shape[-1] ** -0.5), keys, values, lengths)


@jax.custom_vjp
def _attention(query: Array, keys: Array, values: Array, lengths: Array | None) -> Array:
    return _attention_forward(query, keys, values, lengths)[0]


def _attention_forward(
    query: Array, keys: Array, values: Array, lengths: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    scores = jnp.einsum("bhqc,bhkc->bhqk", query, keys, preferred_element_type=jnp.float32)
    if lengths is not None:
        valid = jnp.arange(keys.shape[2]) < lengths[:, None]
        scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(values.dtype)
    mixed = (weights @ values) / total.astype(values.dtype)
    mixed = jnp.swapaxes(mixed, 1, 2).reshape(query.shape[0], query.shape[2], -1)
    mixed = lax.optimization_barrier(mixed)  # one array for both who take it: the layer that follows, and the gradient
    mixed = checkpoint_name(mixed, MIXED)
    return mixed, (query, keys, values, weights, total, mixed)


def _attention_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    """By the scores: W / t (G V^T - d), with G the gradient, t the sum of a row's weights W, and d of G times the
    result: the derivative of the softmax and of its sum in one (Dao et al. 2022, FlashAttention, appendix B.2)."""
    gradient, query, keys, values, weights, total, mixed = after(gradient, *kept)
    heads = (*gradient.shape[:2], query.shape[1], -1)
    gradient, mixed = gradient.reshape(heads), mixed.reshape(heads)
    drawn = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
    gradient, drawn = jnp.swapaxes(gradient, 1, 2), jnp.swapaxes(drawn, 1, 2) / total
    gradient = (gradient / total).astype(values.dtype)
    by_scores = (weights * (jnp.einsum("bhqc,bhkc->bhqk", gradient, values) - drawn)).astype(query.dtype)
    return by_scores @ keys, across(by_scores, query), across(weights, gradient), None


_attention.defvjp(_attention_forward, _attention_backward)


def row_major(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """x, its last axis contiguous. A GPU's XLA may else lay out a whole network by what its end wants, such as a mean
    over tokens, and transpose at each product and norm (a twentieth of a ViT-B/16's step). jax 0.10 knows no way
    to keep such a constraint apart for several devices, and would gather x on all of them."""
    if not on_gpu() or (jax.device_count() > 1 and jax.__version_info__ < (0, 11)):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


WIDEST, OLDEST = 128, 8.0
"""Channels of a head up to which cuDNN's attention has a gradient on every GPU, and the first compute capability (that
of Ampere) that has it at all. Source: NVIDIA's documentation of cuDNN's attention."""


def is_fused(dtype: DTypeLike, channels: int) -> bool:
    """Whether cuDNN has attention in one kernel for heads of so many channels, on this machine's devices."""
    device = jax.local_devices()[0]
    if counting() or not on_gpu() or "cuda" not in device.client.platform_version.lower():
        return False
    if float(device.compute_capability) < OLDEST:
        return False
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and channels % 8 == 0 and channels <= WIDEST


def attend_fused(
    query: Float[Array, "batch last heads channels"],
    keys: Float[Array, "batch tokens heads channels"],
    values: Float[Array, "batch tokens heads channels"],
    lengths: Int[Array, "batch"] | None = None,
    *,
    by: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch last heads*channels"]:
    """`attend` of the same arrays, their axes in another order, where `is_fused`: no scores reach the memory."""
    last, tokens = query.shape[1], keys.shape[1]
    if last % 2 or tokens % 2:  # numbers of tokens of which JAX has no gradient
        lengths = jnp.full(len(query), tokens, jnp.int32) if lengths is None else lengths
        query, keys, values = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, keys, values))
    mixed = jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=lengths, implementation=by)
    return checkpoint_name(mixed[:, :last].reshape(len(mixed), last, -1), MIXED)
