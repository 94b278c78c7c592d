"""LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544): views agree, and their projections are a standard normal."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.base import MethodConfig
from jepax.methods.multiview import (
    JointEmbedding,
    MultiViewConfig,
    Projections,
    invariance,
    refuse_below_one,
    refuse_rectified,
)
from jepax.objectives.directions import unit_directions
from jepax.objectives.sigreg import sigreg
from jepax.types import Metrics, UserError


@dataclass(frozen=True)
class LeJEPAConfig(MultiViewConfig, MethodConfig, name="lejepa"):
    """LeJEPA: no teacher, no stop-gradient, no predictor."""

    weight: float = 0.05
    """Share w of SIGReg in the loss, the invariance having 1 - w. SIGReg grows with the global batch."""
    directions: int = 1024
    """Directions of SIGReg, drawn anew at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rectified(self.projector)
        if not 0 <= self.weight <= 1:
            raise UserError(f"method.weight={self.weight} is not in [0, 1]")
        refuse_below_one(self, "directions")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "LeJEPA":
        return LeJEPA(self, key=key)


class LeJEPA(JointEmbedding):
    """loss = (1 - w) invariance + w mean over views of SIGReg(z_v), the directions shared by the views."""

    config: LeJEPAConfig = eqx.field(static=True)

    def objective(self, groups: tuple[Projections, ...], *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        directions = unit_directions(key, groups[0].shape[2], self.config.directions)
        normality = jnp.mean(jax.vmap(lambda z: sigreg(z, directions))(jnp.concatenate(groups)))
        agreement = invariance(groups)
        loss = (1 - self.config.weight) * agreement + self.config.weight * normality
        return loss, {"invariance": agreement, "sigreg": normality}
