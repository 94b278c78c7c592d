"""What blocks are made of, with gradients of their own: they say what a step keeps for its backward pass, and how.

Left to XLA, a step on a CPU kept GELU's erf, LayerNorm's every stage, attention's weights twice, and so held 1.3 to 1.6
times the temporary memory. Kept are the operands of matrix products, what LayerNorm and GELU were given, attention's
weights, and numbers by row. The rest is computed again where it is wanted: `after` sees to it that it is not sooner.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

EPSILON = 1e-6
MIXED = "attended"
"""Name of what attention gives, for policies of rematerialisation."""


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


def _cumulative(x: Array) -> Array:
    """Phi(x) of the normal distribution."""
    return 0.5 * (1.0 + lax.erf(x * math.sqrt(0.5)))


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU, x Phi(x). Through `erf`: `jax.nn.gelu` goes through `erfc`, which takes twice the time on a CPU."""
    return x * _cumulative(x)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    """g (Phi(x) + x phi(x))."""
    gradient, x = after(gradient, x)
    x = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))
    return (gradient * (_cumulative(x) + x * density).astype(gradient.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _statistics(x: Array) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Mean of the last axis, and one over its deviation."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    return mean, lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + EPSILON)


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
    centred = by - jnp.mean(by, axis=-1, keepdims=True) - normal * jnp.mean(by * normal, axis=-1, keepdims=True)
    by_weight, by_bias = jnp.sum(wide * normal, axis=axes), jnp.sum(wide, axis=axes)
    return (scale * centred).astype(x.dtype), by_weight.astype(weight.dtype), by_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def attend(
    query: Float[Array, "batch heads last channels"],
    keys: Float[Array, "batch heads tokens channels"],
    values: Float[Array, "batch heads tokens channels"],
    valid: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch last heads*channels"]:
    """softmax(Q K^T / sqrt(channels)) V, the heads side by side; tokens that are not `valid` are not attended to.

    The softmax is normalised after the product with the values, which touches fewer numbers. Its statistics are in
    float32, all products in the operands' type, those of the gradient too: JAX's own would take float32 for two of a
    layer's largest.
    """
    return _attention(query * (query.shape[-1] ** -0.5), keys, values, valid)


@jax.custom_vjp
def _attention(query: Array, keys: Array, values: Array, valid: Array | None) -> Array:
    return _attention_forward(query, keys, values, valid)[0]


def _attention_forward(
    query: Array, keys: Array, values: Array, valid: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    scores = jnp.einsum("bhqc,bhkc->bhqk", query, keys, preferred_element_type=jnp.float32)
    if valid is not None:
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
