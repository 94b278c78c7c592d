"""VISReg (Wu et al. 2026, arXiv:2606.02572): views agree, and scale, centre and shape of their projections are kept."""

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
    refuse_negative,
    refuse_rectified,
)
from jepax.objectives import visreg
from jepax.objectives.directions import unit_directions
from jepax.types import Metrics, UserError


@dataclass(frozen=True)
class VISRegConfig(MultiViewConfig, MethodConfig, name="visreg"):
    """VISReg, with the weights of the public ImageNet runs."""

    weight: float = 0.9
    """Share w of the regulariser in the loss, the invariance having 1 - w."""
    scale: float = 1.0
    """Weight of the scale term within the regulariser."""
    centre: float = 1.0
    """Weight of the centre term within the regulariser."""
    shape: float = 1.0
    """Weight of the shape term within the regulariser."""
    directions: int = 4096
    """Directions of the shape term, drawn anew at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rectified(self.projector)
        if not 0 <= self.weight <= 1:
            raise UserError(f"method.weight={self.weight} is not in [0, 1]")
        refuse_negative(self, "scale", "centre", "shape")
        refuse_below_one(self, "directions")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "VISReg":
        return VISReg(self, key=key)


class VISReg(JointEmbedding):
    """loss = (1 - w) invariance + w mean over views of (a scale(z_v) + b centre(z_v) + c shape(z_v))."""

    config: VISRegConfig = eqx.field(static=True)

    def objective(self, groups: tuple[Projections, ...], *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        directions, c = unit_directions(key, groups[0].shape[2], self.config.directions), self.config
        views, agreement = jnp.concatenate(groups), invariance(groups)
        terms = {
            "scale_loss": jnp.mean(jax.vmap(visreg.scale)(views)),
            "centre_loss": jnp.mean(jax.vmap(visreg.centre)(views)),
            "shape_loss": jnp.mean(jax.vmap(lambda z: visreg.shape(z, directions))(views)),
        }
        regulariser = c.scale * terms["scale_loss"] + c.centre * terms["centre_loss"] + c.shape * terms["shape_loss"]
        return (1 - c.weight) * agreement + c.weight * regulariser, {"invariance": agreement} | terms
