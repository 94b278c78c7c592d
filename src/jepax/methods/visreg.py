"""VISReg (Wu et al. 2026, arXiv:2606.02572): views agree, and scale and shape of their projections are kept apart."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.base import MethodConfig
from jepax.methods.multiview import JointEmbedding, MultiViewConfig, Projections, invariance, refuse_negative
from jepax.objectives import visreg
from jepax.objectives.directions import unit_directions
from jepax.types import Metrics


@dataclass(frozen=True)
class VISRegConfig(MultiViewConfig, MethodConfig, name="visreg"):
    """VISReg; the weights are this library's, held against nothing published."""

    scale: float = 1.0
    """Weight of the scale term."""
    shape: float = 1.0
    """Weight of the shape term."""
    directions: int = 1024
    """Directions of the shape term, drawn anew at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_negative(self, "scale", "shape")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "VISReg":
        return VISReg(self, key=key)


class VISReg(JointEmbedding):
    """loss = invariance + mean over views of (a scale(z_v) + b shape(z_v))."""

    config: VISRegConfig = eqx.field(static=True)

    def objective(self, groups: tuple[Projections, ...], *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        directions = unit_directions(key, groups[0].shape[2], self.config.directions)
        views, agreement = jnp.concatenate(groups), invariance(groups)
        scale = jnp.mean(jax.vmap(visreg.scale)(views))
        shape = jnp.mean(jax.vmap(lambda z: visreg.shape(z, directions))(views))
        loss = agreement + self.config.scale * scale + self.config.shape * shape
        return loss, {"invariance": agreement, "scale_loss": scale, "shape_loss": shape}
