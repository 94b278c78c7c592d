"""Matrix products with gradients of their own: in the operands' type, and in the forms that CPUs are quick at."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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


@jax.custom_vjp
def scores_of(
    query: Float[Array, "batch heads last channels"], keys: Float[Array, "batch heads tokens channels"]
) -> Float[Array, "batch heads last tokens"]:
    """Q K^T in float32. Its gradient goes back through products in the operands' type, where JAX's own would take
    float32 for two of a layer's largest products."""
    return jnp.einsum("bhqc,bhkc->bhqk", query, keys, preferred_element_type=jnp.float32)


def _scores_forward(query: Array, keys: Array) -> tuple[Array, tuple[Array, Array]]:
    return scores_of(query, keys), (query, keys)


def _scores_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    query, keys = kept
    gradient = gradient.astype(query.dtype)
    return gradient @ keys, across(gradient, query)


scores_of.defvjp(_scores_forward, _scores_backward)


@jax.custom_vjp
def mixed_by(
    weights: Float[Array, "batch heads last tokens"], values: Float[Array, "batch heads tokens channels"]
) -> Float[Array, "batch heads last channels"]:
    """W V, whose gradient by V goes through `across`."""
    return weights @ values


def _mixed_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    weights, values = kept
    return jnp.einsum("bhqc,bhkc->bhqk", gradient, values), across(weights, gradient)


mixed_by.defvjp(lambda weights, values: (weights @ values, (weights, values)), _mixed_backward)
