"""Rectified LpJEPA (Kuang et al. 2026, arXiv:2602.01456): views agree, and their projections are sparse.

    inv  = mean over pairs of views (v, w) and dimensions of (z_v - z_w)^2,  z = relu(projector(y))
    loss = lambda inv + nu mean over views of RDMReg(z_v, t),  t fresh samples of max(0, mu + sigma g), g ~ GN_p

Differs from the released code: the views share t and a BatchNorm (there one of each per view).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.methods.multiview import Embeddings, MultiView, MultiViewConfig, pairwise_mse, view_metrics
from jepax.nn import ProjectorConfig
from jepax.objectives import rdmreg
from jepax.objectives.slicing import random_unit_directions
from jepax.types import Metrics, UserError


@dataclass(frozen=True)
class RectifiedLpJEPAConfig(MultiViewConfig, name="rectified_lpjepa"):
    """Rectified LpJEPA, with the weights of the paper's ImageNet runs."""

    allows_final_relu: ClassVar[bool] = True
    projector: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(final_relu=True))
    """Head on the mean over patches; it ends in a ReLU."""
    invariance_weight: float = 25.0
    """Weight of the mean squared distance between two views of an image."""
    rdmreg_weight: float = 125.0
    """Weight of RDMReg, mean over views."""
    num_slices: int = 512
    """Directions of RDMReg, redrawn at each step (published: 8192; 512 suffice)."""
    p: float = 1.0
    """Exponent of the generalized Gaussian: 1 is Laplace's distribution, 2 the normal."""
    mu: float = 0.0
    """Mean of the generalized Gaussian before its rectification; lower is sparser."""
    unit_variance: Literal["before_relu", "after_relu"] = "before_relu"
    """Unit variance of the target before the rectification (as published) or after it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("method", self, "at least 0", "invariance_weight", "rdmreg_weight")
        check_fields("method", self, "at least 1", "num_slices")
        check_fields("method", self, "above 0", "p")
        if not self.projector.final_relu:
            raise UserError("method.projector.final_relu=False leaves the projections without a ReLU; set it True")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "RectifiedLpJEPA":
        return RectifiedLpJEPA(self, key=key)


class RectifiedLpJEPA(MultiView):
    """Rectified LpJEPA, with the equations at the top of this file."""

    config: RectifiedLpJEPAConfig = eqx.field(static=True)

    def objective(self, outputs: Embeddings, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups, c = self.project(outputs), self.config
        z = jnp.concatenate(groups)  # (V, B, D), none below 0

        # Views of an image agree.
        inv = pairwise_mse(z)

        # The target has unit variance, before its ReLU or after it.
        before = c.unit_variance == "before_relu"
        sigma = rdmreg.sigma_before_relu(c.p) if before else rdmreg.sigma_after_relu(c.p, c.mu)

        # Along any direction, each view's projections are distributed as samples of the target.
        key_directions, key_target = jr.split(key)
        directions = random_unit_directions(key_directions, z.shape[2], c.num_slices)
        target = rdmreg.sample_target(key_target, z.shape[1:], p=c.p, mu=c.mu, sigma=sigma)
        rdmreg_loss = jnp.mean(jax.vmap(lambda z_v: rdmreg.rdmreg(z_v, target, directions))(z))

        loss = c.invariance_weight * inv + c.rdmreg_weight * rdmreg_loss
        return loss, view_metrics(outputs, groups) | {
            "train/invariance_loss": inv,
            "train/rdmreg_loss": rdmreg_loss,
            "health/nonzero_fraction": jnp.mean(z > 0),
            "health/nonzero_fraction_expected": jnp.float32(rdmreg.nonzero_fraction(c.p, c.mu, sigma)),
        }
