"""Collapse metrics without labels, computed on the host in float64 from one embedding per image.

They run on the host because training steps hung on a CPU (jax 0.10.1 and 0.10.2, one core), each time after jaxlib's
singular value and QR decompositions ran between steps. This cause is suspected, not shown; see docs/log.md.
"""

import numpy as np

from jepax.types import AnyArray, Float

STD_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Logged quantiles of the features' standard deviations."""
DEAD_STD_RATIO = 0.01
"""A feature is dead if its deviation is at most this fraction of the features' root mean square deviation."""
FLOAT32_ROUNDING = 1e-6
"""Or at most this fraction of the embeddings' root mean square, which is float32's rounding."""


def collapse_metrics(
    embeddings: Float[AnyArray, "n dim"], prefix: str = "health/embedding"
) -> dict[str, float | list[float]]:
    """Returns the logged metrics of one batch: deviations, dead features, cosine, rank and slope of the spectrum."""
    # Convert once: each metric below then works on the same float64 array.
    x = np.asarray(embeddings, np.float64)
    return {
        f"{prefix}/std": feature_std(x),
        f"{prefix}/std_quantiles": std_quantiles(x),
        f"{prefix}/dead_fraction": dead_features(x),
        f"{prefix}/mean_cosine": mean_cosine(x),
        f"{prefix}/rankme": rankme(x),
        f"{prefix}/alpha_req": alpha_req(x),
    }


def rankme(embeddings: Float[AnyArray, "n dim"]) -> float:
    """RankMe = exp(-sum_k p_k log p_k) with p_k = sigma_k / sum sigma (Garrido et al. 2023, arXiv:2210.02885).

    sigma are the singular values of the embeddings, which are not centered. Between 1 (all rows collinear, total
    collapse) and min(n, dim). Use n well above dim.

    The singular values are roots of the Gram matrix's eigenvalues, in float64: exact to about 1e-8 of the largest.

    *Differs from the reference:* 0 log 0 = 0 instead of 1e-7 added to p, and all-zero embeddings give 1.
    """
    # Rounding may make an eigenvalue negative.
    return _exp_entropy(np.sqrt(np.clip(_gram_eigenvalues(np.asarray(embeddings, np.float64)), 0.0, None)))


def alpha_req(embeddings: Float[AnyArray, "n dim"]) -> float:
    """The slope alpha of lambda_j ~ j^-alpha over the covariance's eigenvalues (Agrawal et al. 2022, arXiv:2202.05808).

    A least-squares fit to (log j, log lambda_j), j = 1, 2, ... The paper finds about 1 in good representations; 0 is a
    white spectrum, and a large alpha is near collapse. NaN with fewer than two eigenvalues.

    *Differs from the reference:* every j has equal weight, from the first to the last lambda_j above 1e-10 of the
    first; its code leaves out the first few and weights by 1 / j.
    """
    # Eigenvalues of the covariance up to a factor, descending. Centering leaves at most n - 1; the rest is rounding.
    x = np.asarray(embeddings, np.float64)
    spectrum = _gram_eigenvalues(x - x.mean(axis=0))[::-1][: min(x.shape[0] - 1, x.shape[1])]
    spectrum = spectrum[spectrum > 1e-10 * spectrum[:1]]
    if len(spectrum) < 2:
        return float("nan")

    # The slope of the least-squares fit, with the sign of a decay.
    rank = np.log(np.arange(1, len(spectrum) + 1))
    rank, height = rank - rank.mean(), np.log(spectrum) - np.log(spectrum).mean()
    return float(-(rank @ height) / (rank @ rank))


def lidar(embeddings: Float[AnyArray, "images views dim"], delta: float = 1e-4) -> float:
    """LiDAR = exp(-sum_k p_k log p_k), p_k = lambda_k / sum lambda (Thilak et al. 2023, arXiv:2312.04000).

    lambda are the eigenvalues of W^-1/2 B W^-1/2, with B the covariance of the images' means over their views, and
    W = delta I + the mean over images of the covariance of its views: the rank of the features that differ between
    images and agree between views of one. Between 1 and min(images - 1, dim); 1 if every image has the same mean.

    `delta` is in the embeddings' unit, squared. *Differs from the reference:* 0 log 0 = 0 instead of epsilon in p.
    """
    # B (dim, dim): covariance between images; W (dim, dim): mean covariance within an image.
    x = np.asarray(embeddings, np.float64)
    means = x.mean(axis=1)
    between, within = means - means.mean(axis=0), (x - means[:, None]).reshape(-1, x.shape[2])
    between, within = between.T @ between / len(between), within.T @ within / len(within)

    # W's eigenvalues are at least `delta`, but for rounding.
    values, vectors = np.linalg.eigh(within + delta * np.eye(x.shape[2]))
    whiten = vectors / np.sqrt(np.maximum(values, delta))  # W^-1/2 up to a rotation, which does not change eigenvalues
    return _exp_entropy(np.clip(np.linalg.eigvalsh(whiten.T @ between @ whiten), 0.0, None))


def feature_std(embeddings: Float[AnyArray, "n dim"]) -> float:
    """Mean over features of the standard deviation over the batch, in the embeddings' unit: 0 at total collapse."""
    return float(np.std(np.asarray(embeddings, np.float64), axis=0).mean())


def std_quantiles(embeddings: Float[AnyArray, "n dim"]) -> list[float]:
    """`STD_QUANTILES` over features of the standard deviation over the batch, in the embeddings' unit."""
    return np.quantile(np.std(np.asarray(embeddings, np.float64), axis=0), STD_QUANTILES).tolist()


def dead_features(embeddings: Float[AnyArray, "n dim"]) -> float:
    """Fraction of constant features, by `DEAD_STD_RATIO` of all deviations or `FLOAT32_ROUNDING` of the values."""
    x = np.asarray(embeddings, np.float64)
    std = np.std(x, axis=0)
    floor = max(DEAD_STD_RATIO * np.sqrt(np.mean(std**2)), FLOAT32_ROUNDING * np.sqrt(np.mean(x**2)))

    # `<=`, so that all features are dead if all embeddings are zero.
    return float(np.mean(std <= floor))


def mean_cosine(embeddings: Float[AnyArray, "n dim"]) -> float:
    """Mean over pairs of different images of the cosine between their embeddings: 1 at total collapse.

    Embeddings are not centered, so a component common to all images counts. An embedding of zeros has cosine 0. NaN
    for a single embedding.
    """
    # |sum_i u_i|^2 = sum_i |u_i|^2 + the sum over pairs: linear in n, without the n x n matrix of cosines.
    x = np.asarray(embeddings, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    pairs = len(x) * (len(x) - 1)
    if not pairs:
        return float("nan")
    return float((np.sum(unit.sum(axis=0) ** 2) - np.sum(unit**2)) / pairs)


def _gram_eigenvalues(x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "side"]:
    """Eigenvalues, ascending, of the smaller of x^T x and x x^T, which have the same nonzero ones."""
    return np.linalg.eigvalsh(x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T)


def _exp_entropy(weights: Float[np.ndarray, "n"]) -> float:
    """exp(entropy) of the weights over their sum; 1 if all are zero."""
    if not weights.sum() > 0:
        return 1.0
    p = weights[weights > 0] / weights.sum()
    return float(np.exp(-np.sum(p * np.log(p))))
