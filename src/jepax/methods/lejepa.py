"""LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544): views agree, and their projections are a standard normal.

    inv  = mean over views v of |z_v - mean over global views of z|^2 / dim
    loss = (1 - w) inv + w mean over views of SIGReg(z_v)

The views share SIGReg's directions, which are new at each step. No teacher, no stop-gradient, no predictor.
"""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.methods.multiview import Embeddings, MultiView, MultiViewConfig, invariance_loss, view_metrics
from jepax.objectives.sigreg import sigreg_by_group
from jepax.objectives.slicing import random_unit_directions
from jepax.types import Metrics


@dataclass(frozen=True)
class LeJEPAConfig(MultiViewConfig, name="lejepa"):
    """LeJEPA, with the weight of the paper."""

    sigreg_weight: float = 0.05
    """Fraction w of SIGReg in the loss; the invariance has 1 - w. SIGReg grows with the global batch."""
    num_slices: int = 1024
    """Directions of SIGReg, redrawn at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("method", self, "in [0, 1]", "sigreg_weight")
        check_fields("method", self, "at least 1", "num_slices")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "LeJEPA":
        return LeJEPA(self, key=key)


class LeJEPA(MultiView):
    """LeJEPA, with the equations at the top of this file."""

    config: LeJEPAConfig = eqx.field(static=True)

    def objective(self, outputs: Embeddings, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups, w = self.project(outputs), self.config.sigreg_weight
        z = jnp.concatenate(groups)  # (V, B, D)

        # Views of an image agree.
        inv = invariance_loss(groups)

        # Each view's projections, along any direction, are a standard normal.
        directions = random_unit_directions(key, z.shape[2], self.config.num_slices)
        sigreg_loss = sigreg_by_group(z, directions)

        loss = (1 - w) * inv + w * sigreg_loss
        return loss, view_metrics(outputs, groups) | {"train/invariance_loss": inv, "train/sigreg_loss": sigreg_loss}
