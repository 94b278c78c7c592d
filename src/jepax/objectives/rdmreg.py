"""RDMReg: match embeddings to a rectified generalized Gaussian (Kuang et al. 2026, arXiv:2602.01456).

The target is y = max(0, mu + sigma g), with g of density p^(1 - 1/p) / (2 Gamma(1/p)) exp(-|g|^p / p).
"""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.optimize import brentq
from scipy.special import gamma, gammaincc

from jepax.objectives.slicing import DIRECTIONS_PER_CHUNK, project_onto_directions, sliced_mean


def rdmreg(
    features: Float[Array, "batch dim"],
    target: Float[Array, "batch dim"],
    directions: Float[Array, "dim directions"],
    chunk: int | None = DIRECTIONS_PER_CHUNK,
) -> Float[Array, ""]:
    """Mean over unit `directions` of the squared 2-Wasserstein distance between the two projected batches.

    For two batches of N numbers it is the mean squared difference after sorting. Scale: that of squared features,
    independent of global batch and width. Source: Kuang et al. 2026, section on RDMReg; Bonneel et al. 2015.
    """

    def distance(part: Float[Array, "dim chunk"]) -> Float[Array, "chunk"]:
        x, y = (jnp.sort(project_onto_directions(batch, part), axis=0) for batch in (features, target))
        return jnp.mean(jnp.square(x - y), axis=0)

    return sliced_mean(distance, directions, chunk)


def sample_generalized_gaussian(key: PRNGKeyArray, p: float, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """g = +-(p G)^(1/p) with G ~ Gamma(1/p): Laplace at p = 1, standard normal at p = 2.

    Computed in logarithms: at large p most of G underflows float32, while its root is near 1.
    """
    key_size, key_sign = jr.split(key)
    size = jnp.exp((np.log(p) + jr.loggamma(key_size, 1 / p, shape)) / p)
    return jr.rademacher(key_sign, shape) * size


def sample_target(
    key: PRNGKeyArray, shape: tuple[int, ...], *, p: float = 1.0, mu: float = 0.0, sigma: float | None = None
) -> Float[Array, "*shape"]:
    """Samples of max(0, mu + sigma g); sigma None means `sigma_before_relu(p)`, the paper's default."""
    sigma = sigma_before_relu(p) if sigma is None else sigma
    return jnp.maximum(0.0, mu + sigma * sample_generalized_gaussian(key, p, shape))


def sigma_before_relu(p: float) -> float:
    """Sigma of unit variance before the rectification: sqrt(Gamma(1/p) / Gamma(3/p)) / p^(1/p)."""
    return float(np.sqrt(gamma(1 / p) / gamma(3 / p)) / p ** (1 / p))


def sigma_after_relu(p: float, mu: float) -> float:
    """Sigma of unit variance after the rectification, by root finding: it has no closed form."""
    high = 1.0
    while moments(p, mu, high)[1] < 1:
        high *= 2
    return float(brentq(lambda sigma: moments(p, mu, sigma)[1] - 1, 1e-6, high, xtol=1e-12))


def moments(p: float, mu: float, sigma: float) -> tuple[float, float]:
    """Mean and variance of max(0, mu + sigma g), in float64.

    E y^k = sum over j of binom(k, j) mu^(k - j) sigma^j T_j, with T_j the integral of g^j above -mu / sigma.
    """
    tail = [_tail_moment(j, -mu / sigma, p) for j in range(3)]
    mean = mu * tail[0] + sigma * tail[1]
    square = mu**2 * tail[0] + 2 * mu * sigma * tail[1] + sigma**2 * tail[2]
    return float(mean), float(square - mean**2)


def nonzero_fraction(p: float, mu: float, sigma: float) -> float:
    """Expected fraction of entries above zero: P(g > -mu / sigma)."""
    return float(_tail_moment(0, -mu / sigma, p))


def _tail_moment(power: int, start: float, p: float) -> float:
    """Integral from `start` to infinity of g^power times the density of g.

    For start >= 0: half of E|g|^power times the upper incomplete Gamma ratio; below 0: by symmetry of the density.
    """
    absolute = p ** (power / p) * gamma((power + 1) / p) / gamma(1 / p)
    upper = 0.5 * absolute * gammaincc((power + 1) / p, abs(start) ** p / p)
    return upper if start >= 0 or power % 2 else absolute - upper
