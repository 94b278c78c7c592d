"""VISReg's regulariser: scale and shape of the embeddings apart (Wu et al. 2026, arXiv:2606.02572)."""

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri
from jaxtyping import Array, Float

from jepax.objectives.directions import mean_over_directions

EPS = 1e-4


def scale(embeddings: Float[Array, "batch dim"]) -> Float[Array, ""]:
    """mean over dimensions j of (1 - sigma_j)^2, sigma_j = sqrt(var(z_j) + eps) over the global batch.

    Scale: 1 at collapse, with a gradient that does not vanish there; whatever width and batch.
    Source: Wu et al. 2026, the scale term.
    """
    return jnp.mean(jnp.square(1 - jnp.sqrt(jnp.var(embeddings, axis=0) + EPS)))


def shape(embeddings: Float[Array, "batch dim"], directions: Float[Array, "dim directions"]) -> Float[Array, ""]:
    """Sliced 2-Wasserstein distance, squared, of the standardised embeddings to the standard normal.

    Along each unit direction: the mean squared difference between the sorted projections and the normal's quantiles at
    (i - 1/2) / N. Scale: 0 where every projection is normal, 1 + 1 / N of noise or less otherwise; not with N or width.
    Source: Wu et al. 2026, the shape term. Differs from the reference: fixed quantiles, where normal samples would add
    noise of their own; and the deviations that standardise carry no gradient, so that the scale is left to `scale`.
    """
    centred = embeddings - jnp.mean(embeddings, axis=0)
    normal = centred * lax.stop_gradient(lax.rsqrt(jnp.var(embeddings, axis=0) + EPS))
    count = embeddings.shape[0]
    quantiles = ndtri((jnp.arange(count) + 0.5) / count)[:, None]

    def distance(some: Float[Array, "dim chunk"]) -> Float[Array, "chunk"]:
        return jnp.mean(jnp.square(jnp.sort(normal @ some, axis=0) - quantiles), axis=0)

    return mean_over_directions(distance, directions)
