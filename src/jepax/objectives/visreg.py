"""VISReg's regularizer: separate terms for scale, center and shape (Wu et al. 2026, arXiv:2606.02572)."""

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri
from jaxtyping import Array, Float

from jepax.objectives.slicing import DIRECTIONS_PER_CHUNK, project_onto_directions, sliced_mean

VARIANCE_EPS = 1e-12
"""Added to the variance before its root, because the root's slope is infinite at 0."""


def scale_term(embeddings: Float[Array, "batch dim"]) -> Float[Array, ""]:
    """mean over dimensions j of (1 - sigma_j)^2, sigma_j the deviation of z_j over the global batch.

    Scale: 1 at collapse, with slope 2 / dim in sigma_j; independent of width and batch. Source: Wu et al. 2026.
    """
    return jnp.mean(jnp.square(1 - jnp.sqrt(jnp.var(embeddings, axis=0) + VARIANCE_EPS)))


def center_term(embeddings: Float[Array, "batch dim"]) -> Float[Array, ""]:
    """mean over dimensions j of mu_j^2, mu_j the mean of z_j over the global batch.

    Scale: that of squared embeddings, independent of width and batch. Source: Wu et al. 2026, public code.
    """
    return jnp.mean(jnp.square(jnp.mean(embeddings, axis=0)))


def shape_term(
    embeddings: Float[Array, "batch dim"],
    directions: Float[Array, "dim directions"],
    chunk: int | None = DIRECTIONS_PER_CHUNK,
) -> Float[Array, ""]:
    """Squared sliced 2-Wasserstein distance from the standardized embeddings to the standard normal.

    Along each unit direction: the mean squared difference between the sorted projections and the normal's quantiles at
    i / (N + 1), i = 1..N of the global batch. The standardizing deviations have no gradient, so only `scale_term` moves
    the scale. Scale: near 0 if every projection is normal, of order 1 if none is; independent of N and width.
    Source: Wu et al. 2026, the shape term and public code.
    """
    centered = embeddings - jnp.mean(embeddings, axis=0)
    normal = centered * lax.stop_gradient(lax.rsqrt(jnp.var(embeddings, axis=0) + VARIANCE_EPS))
    quantiles = ndtri((jnp.arange(len(embeddings)) + 1) / (len(embeddings) + 1))[:, None]

    def distance(part: Float[Array, "dim chunk"]) -> Float[Array, "chunk"]:
        return jnp.mean(jnp.square(jnp.sort(project_onto_directions(normal, part), axis=0) - quantiles), axis=0)

    return sliced_mean(distance, directions, chunk)
