"""VICReg (Bardes et al. 2022, arXiv:2105.04906): views agree, every dimension varies, no two correlate.

    inv  = mean over pairs of views (v, w) and dimensions of (z_v - z_w)^2
    var  = mean over views and dimensions j of max(0, 1 - std(z_vj))
    cov  = mean over views of (1 / dim) sum over i != j of Cov(z_v)_ij^2
    loss = lambda inv + mu var + 2 nu cov

As in the released code (facebookresearch/vicreg, main_vicreg.py) the variance term is halved over two views and the
invariance is a mean over dimensions; the paper's equation 6 sums both. With more than two views, all pairs have equal
weight. Differs from the code: BatchNorm reads all views together. Requires a global batch of at least two images.
"""

from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.methods.multiview import Embeddings, MultiView, MultiViewConfig, pairwise_mse, view_metrics
from jepax.objectives import covariance, variance
from jepax.types import Metrics


@dataclass(frozen=True)
class VICRegConfig(MultiViewConfig, name="vicreg"):
    """VICReg, with the weights of the paper and the terms of its released code."""

    allows_final_relu: ClassVar[bool] = True
    sim_coeff: float = 25.0
    """Weight of the mean squared distance between two views of an image."""
    std_coeff: float = 25.0
    """Weight of the variance term, a mean over views (a sum over two views, as in the paper, has half this weight)."""
    cov_coeff: float = 1.0
    """Weight of the covariance term, summed over two views (mean over views, times 2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("method", self, "at least 0", "sim_coeff", "std_coeff", "cov_coeff")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "VICReg":
        return VICReg(self, key=key)


class VICReg(MultiView):
    """VICReg, with the equations at the top of this file."""

    config: VICRegConfig = eqx.field(static=True)

    def objective(self, outputs: Embeddings, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups, c = self.project(outputs), self.config
        z = jnp.concatenate(groups)  # (V, B, D)

        # Views of an image agree.
        inv = pairwise_mse(z)

        # In the batch of each view every dimension varies, and no two correlate.
        var = jnp.mean(jax.vmap(variance)(z))
        cov = jnp.mean(jax.vmap(covariance)(z))

        # The factor 2: the covariance term is a sum over two views, here a mean over any number of them.
        loss = c.sim_coeff * inv + c.std_coeff * var + 2 * c.cov_coeff * cov
        terms = {"train/invariance_loss": inv, "train/variance_loss": var, "train/covariance_loss": cov}
        return loss, view_metrics(outputs, groups) | terms
