"""Signs of collapse that need no labels; both functions have static shapes and may be called under `jit`."""

import jax.numpy as jnp
from jax.scipy.special import entr

from jepax.types import AnyArray, Array, Float


def effective_rank(embeddings: Float[AnyArray, "n dim"]) -> Float[Array, ""]:
    """RankMe = exp(-sum_k p_k log p_k) with p_k = sigma_k / sum sigma (Garrido et al. 2023, arXiv:2210.02885).

    sigma are the singular values of the embeddings, which are not centred. Between 1 (all rows on one line, total
    collapse) and min(n, dim). It needs n well above dim to say something about the encoder.

    The singular values are those of the triangle of a QR decomposition, hence exact to about 1e-7 of the largest one in
    float32. The Gram matrix would be cheaper, but its eigenvalues are the squares: rounding below 3e-4 of the largest
    singular value would hide the very collapse that is looked for.

    *Differs from the reference:* 0 log 0 = 0 instead of 1e-7 added to p, and all-zero embeddings give 1.
    """
    x = jnp.asarray(embeddings, jnp.float32)
    tall = x if x.shape[0] >= x.shape[1] else x.T
    sigma = jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False)
    total = sigma.sum()
    return jnp.exp(entr(sigma / jnp.where(total > 0, total, 1)).sum())


def feature_std(embeddings: Float[AnyArray, "n dim"]) -> Float[Array, ""]:
    """Mean over features of the standard deviation over the batch, in the embeddings' unit: 0 at total collapse."""
    return jnp.std(jnp.asarray(embeddings, jnp.float32), axis=0).mean()
