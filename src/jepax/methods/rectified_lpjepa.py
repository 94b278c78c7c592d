"""Rectified LpJEPA (Kuang et al. 2026, arXiv:2602.01456): views agree, and their projections are sparse by design."""

from dataclasses import dataclass, field
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.base import MethodConfig
from jepax.methods.multiview import (
    JointEmbedding,
    MultiViewConfig,
    Projections,
    refuse_below_one,
    refuse_negative,
    spread,
)
from jepax.nn import ProjectorConfig
from jepax.objectives import rdmreg
from jepax.objectives.directions import unit_directions
from jepax.types import Metrics, UserError


@dataclass(frozen=True)
class RectifiedLpJEPAConfig(MultiViewConfig, MethodConfig, name="rectified_lpjepa"):
    """Rectified LpJEPA, with the weights of the paper's ImageNet runs."""

    projector: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(rectified=True))
    """Head on the mean over patches; it ends in a ReLU."""
    invariance: float = 25.0
    """Weight of the mean squared distance between two views of an image."""
    matching: float = 125.0
    """Weight of RDMReg, mean over views."""
    directions: int = 512
    """Directions of RDMReg, drawn anew at each step (8192 as published, where 512 suffice)."""
    p: float = 1.0
    """Exponent of the generalised Gaussian: 1 is Laplace's distribution, 2 the normal."""
    mu: float = 0.0
    """Mean of the generalised Gaussian before its rectification; lower is sparser."""
    sigma: Literal["before", "after"] = "before"
    """Whether the variance is 1 before the rectification (as published) or after it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_negative(self, "invariance", "matching")
        refuse_below_one(self, "directions")
        if self.p <= 0:
            raise UserError(f"method.p={self.p} must be above 0; try 1.0")
        if not self.projector.rectified:
            raise UserError("method.projector.rectified=False leaves the projections without a ReLU; set it True")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "RectifiedLpJEPA":
        return RectifiedLpJEPA(self, key=key)


class RectifiedLpJEPA(JointEmbedding):
    """loss = lambda s(Z, Z') + nu mean over views of RDMReg(Z, Y), Y fresh samples of the target each step.

    Differs from the released code: the views share Y, which that draws for each, and a BatchNorm.
    """

    config: RectifiedLpJEPAConfig = eqx.field(static=True)

    @property
    def _sigma(self) -> float:
        c = self.config
        return rdmreg.sigma_before(c.p) if c.sigma == "before" else rdmreg.sigma_after(c.p, c.mu)

    def objective(self, groups: tuple[Projections, ...], *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        views, c = jnp.concatenate(groups), self.config
        key_directions, key_target = jr.split(key)
        directions = unit_directions(key_directions, views.shape[2], c.directions)
        target = rdmreg.rectified(key_target, views.shape[1:], p=c.p, mu=c.mu, sigma=self._sigma)
        matching = jnp.mean(jax.vmap(lambda z: rdmreg.rdmreg(z, target, directions))(views))
        agreement = spread(views)
        metrics = {
            "invariance": agreement,
            "rdmreg": matching,
            "share_of_nonzeros": jnp.mean(views > 0),
            "expected_share_of_nonzeros": jnp.float32(rdmreg.share_of_nonzeros(c.p, c.mu, self._sigma)),
        }
        return c.invariance * agreement + c.matching * matching, metrics
