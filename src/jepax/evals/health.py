"""Signs of collapse that need no labels, computed on the host.

On the host: training steps were seen to hang on a CPU (jax 0.10.1 and 0.10.2, one core), each time after jaxlib's
singular value and QR decompositions had run between steps. That these are the
cause is suspected, not shown; see docs/log.md.
"""

import numpy as np

from jepax.types import AnyArray, Float


def effective_rank(embeddings: Float[AnyArray, "n dim"]) -> float:
    """RankMe = exp(-sum_k p_k log p_k) with p_k = sigma_k / sum sigma (Garrido et al. 2023, arXiv:2210.02885).

    sigma are the singular values of the embeddings, which are not centred. Between 1 (all rows on one line, total
    collapse) and min(n, dim). It needs n well above dim to say something about the encoder.

    The singular values are roots of the Gram matrix's eigenvalues, in float64: exact to about 1e-8 of the largest.

    *Differs from the reference:* 0 log 0 = 0 instead of 1e-7 added to p, and all-zero embeddings give 1.
    """
    x = np.asarray(embeddings, np.float64)
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None))
    if not sigma.sum() > 0:
        return 1.0
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def feature_std(embeddings: Float[AnyArray, "n dim"]) -> float:
    """Mean over features of the standard deviation over the batch, in the embeddings' unit: 0 at total collapse."""
    return float(np.std(np.asarray(embeddings, np.float64), axis=0).mean())


def diagnosis(features):
    return {"effective_rank": effective_rank(features[:4096]), "feature_std": feature_std(features[:4096])}
