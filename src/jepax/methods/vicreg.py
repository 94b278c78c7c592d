"""VICReg (Bardes et al. 2022, arXiv:2105.04906): views agree, every dimension varies, no two dimensions agree."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.base import MethodConfig
from jepax.methods.multiview import JointEmbedding, MultiViewConfig, Projections, refuse_negative, spread
from jepax.objectives import covariance, variance
from jepax.types import Metrics


@dataclass(frozen=True)
class VICRegConfig(MultiViewConfig, MethodConfig, name="vicreg"):
    """VICReg, with the weights of the paper, on terms as its released code takes them."""

    invariance: float = 25.0
    """Weight of the mean squared distance between two views of an image."""
    variance: float = 25.0
    """Weight of the variance term, mean over views (the paper sums it over the two: there 12.5 is this 25)."""
    covariance: float = 1.0
    """Weight of the covariance term, summed over two views (mean over views, times 2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_negative(self, "invariance", "variance", "covariance")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "VICReg":
        return VICReg(self, key=key)


class VICReg(JointEmbedding):
    """loss = lambda s(Z, Z') + mu mean over views of v(Z) + 2 nu mean over views of c(Z).

    As in the released code (facebookresearch/vicreg, main_vicreg.py) v is halved over two views and s is a mean over
    dimensions, where the paper's equation 6 sums both. Of more than two views every pair counts alike. Differs from the
    code: BatchNorm reads all views together. Needs a global batch of two images at least.
    """

    config: VICRegConfig = eqx.field(static=True)

    def objective(self, groups: tuple[Projections, ...], *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        views, c = jnp.concatenate(groups), self.config
        agreement = spread(views)
        dead, alike = jnp.mean(jax.vmap(variance)(views)), jnp.mean(jax.vmap(covariance)(views))
        loss = c.invariance * agreement + c.variance * dead + 2 * c.covariance * alike
        return loss, {"invariance": agreement, "variance_loss": dead, "covariance_loss": alike}
