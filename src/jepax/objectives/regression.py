"""Distances between predicted and target embeddings."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def smooth_l1(
    prediction: Float[Array, "*shape"], target: Float[Array, "*shape"], beta: float = 1.0
) -> Float[Array, "*shape"]:
    """|d|^2 / (2 beta) if |d| < beta, else |d| - beta / 2, with d = prediction - target; elementwise.

    Its gradient is clipped to [-1, 1]. Scale: per element, so the mean does not depend on the width.
    Source: Girshick 2015; the loss of the released I-JEPA code, with beta 1 (the paper has squared error).
    """
    distance = jnp.abs(prediction - target)
    return jnp.where(distance < beta, 0.5 * jnp.square(distance) / beta, distance - 0.5 * beta)


def masked_mean(values: Float[Array, "*shape dim"], valid: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean over all elements of the valid tokens of the global batch."""
    weights = valid[..., None].astype(values.dtype)
    return jnp.sum(values * weights) / (jnp.sum(weights) * values.shape[-1])


def explained_fraction(loss: Float[Array, ""], of_the_mean: Float[Array, ""]) -> Float[Array, ""]:
    """1 - loss / (loss of predicting the batch mean): 1 is perfect, 0 is no better than the mean.

    Also 0 if the targets do not vary, as at total collapse. For logging only: no gradient.
    """
    fraction = 1 - loss / jnp.where(of_the_mean > 0, of_the_mean, 1)
    return lax.stop_gradient(jnp.where(of_the_mean > 0, fraction, 0))
