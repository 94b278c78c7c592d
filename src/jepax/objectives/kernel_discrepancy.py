"""Kernel discrepancies between embeddings and the standard normal N(0, I), in closed form: no directions, no samples.

    MMD^2(P, Q) = E k(x, x') - 2 E k(x, y) + E k(y, y')     x, x' ~ P the embeddings; y, y' ~ Q = N(0, I)
    KSD^2(P, Q) = E u(x, x')                                u is Stein's kernel: k, and the score -x of Q

Both are 0 if and only if P = Q. Source: Gretton et al. 2012 (MMD); Liu et al. 2016, Chwialkowski et al. 2016 (KSD);
as regularizers Zimmermann et al. 2025 (KerJEPA, arXiv:2512.19605).
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Kernel = Literal["gaussian", "imq"]


def mmd_gaussian(z: Float[Array, "batch dim"], bandwidth: float) -> Float[Array, ""]:
    """MMD^2 to N(0, I) with the kernel k(x, y) = exp(-|x - y|^2 / (2 h^2)), h the bandwidth.

    E k(x, y) = (h^2 / (h^2 + 1))^(d/2) exp(-|x|^2 / (2 (h^2 + 1))) and E k(y, y') = (h^2 / (h^2 + 2))^(d/2).

    Scale: in [0, 2], a mean over all pairs of examples (pairs (x, x) too, so about (1 - E k) / batch at best).
    """
    h2, dim = bandwidth**2, z.shape[1]
    within = jnp.mean(jnp.exp(-squared_distances(z) / (2 * h2)))
    norms = jnp.sum(jnp.square(z), axis=1)
    cross = (h2 / (h2 + 1)) ** (dim / 2) * jnp.mean(jnp.exp(-norms / (2 * (h2 + 1))))
    return within - 2 * cross + (h2 / (h2 + 2)) ** (dim / 2)


def ksd(z: Float[Array, "batch dim"], kernel: Kernel, bandwidth: float) -> Float[Array, ""]:
    """KSD^2 to N(0, I) with a radial kernel k(x, y) = f(r), r = |x - y|^2.

    u(x, y) = x.y f(r) + 2 r f'(r) - 4 r f''(r) - 2 d f'(r): Stein's kernel for the score -x.
    gaussian: f = exp(-r / (2 h^2)). imq (inverse multiquadric): f = (1 + r / h^2)^(-1/2).

    Scale: of the order of d / h^2; an unbiased mean over pairs of different examples, so it may be negative at the
    optimum. Pairs (x, x) would add |x|^2 + d / h^2 and pull the embeddings to 0.
    """
    h2, dim = bandwidth**2, z.shape[1]
    r = squared_distances(z)
    if kernel == "gaussian":
        f = jnp.exp(-r / (2 * h2))
        f1, f2 = -f / (2 * h2), f / (4 * h2**2)  # first and second derivative by r
    else:
        base = 1 + r / h2
        f, f1, f2 = base**-0.5, -0.5 / h2 * base**-1.5, 0.75 / h2**2 * base**-2.5
    inner = jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST)
    pairs = inner * f + 2 * r * f1 - 4 * r * f2 - 2 * dim * f1
    others = ~jnp.eye(len(z), dtype=bool)
    return jnp.sum(jnp.where(others, pairs, 0.0)) / jnp.sum(others)


def squared_distances(z: Float[Array, "batch dim"]) -> Float[Array, "batch batch"]:
    """|z_i - z_j|^2 for every pair of rows; exactly 0 on the diagonal."""
    norms = jnp.sum(jnp.square(z), axis=1)
    inner = jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST)
    distances = jnp.maximum(norms[:, None] + norms[None, :] - 2 * inner, 0.0)
    return jnp.where(jnp.eye(len(z), dtype=bool), 0.0, distances)
