"""VICReg's two regularizers (Bardes et al. 2022, arXiv:2105.04906): every dimension varies, no two correlate."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

VARIANCE_EPS = 1e-4
"""Added to the variance before its root, as in the paper."""


def variance(embeddings: Float[Array, "batch dim"], floor: float = 1.0) -> Float[Array, ""]:
    """mean over dimensions j of max(0, floor - sqrt(var(z_j) + eps)): 0 if every deviation reaches `floor`.

    Scale: from 0 to `floor`, independent of width and batch. Source: Bardes et al. 2022, equation 1. NaN for a single
    embedding, which has no variance.
    """
    return jnp.mean(jax.nn.relu(floor - jnp.sqrt(jnp.var(embeddings, axis=0, ddof=1) + VARIANCE_EPS)))


def covariance(embeddings: Float[Array, "batch dim"]) -> Float[Array, ""]:
    """(1 / dim) sum over i != j of C_ij^2, with C the covariance over the global batch.

    Scale: grows with the fourth power of the embeddings and with the fraction of correlated dimensions; independent of
    the batch, except for the noise of C. Source: Bardes et al. 2022, equations 3 and 4. NaN for a single embedding.
    """
    count, dim = embeddings.shape
    centered = embeddings - jnp.mean(embeddings, axis=0)
    squares = jnp.square(jnp.matmul(centered.T, centered, precision=lax.Precision.HIGHEST) / (count - 1))
    return (jnp.sum(squares) - jnp.sum(jnp.diagonal(squares))) / dim
