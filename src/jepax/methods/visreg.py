"""VISReg (Wu et al. 2026, arXiv:2606.02572): views agree; scale, center and shape of their projections are regularized.

    inv  = mean over views v of |z_v - mean over global views of z|^2 / dim
    loss = (1 - w) inv + w mean over views of [ a scale(z_v) + b center(z_v) + c shape(z_v) ]

The three terms are in `objectives/visreg.py`.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.multiview import (
    Embeddings,
    MultiView,
    MultiViewConfig,
    check_counts,
    check_no_final_relu,
    check_weights,
    invariance_loss,
    view_metrics,
)
from jepax.objectives import visreg
from jepax.objectives.slicing import random_unit_directions
from jepax.types import Metrics, UserError


@dataclass(frozen=True)
class VISRegConfig(MultiViewConfig, name="visreg"):
    """VISReg, with the weights of the public ImageNet runs."""

    visreg_weight: float = 0.9
    """Fraction w of the regularizer in the loss; the invariance has 1 - w."""
    scale_weight: float = 1.0
    """Weight of the scale term within the regularizer."""
    center_weight: float = 1.0
    """Weight of the center term within the regularizer."""
    shape_weight: float = 1.0
    """Weight of the shape term within the regularizer."""
    num_slices: int = 4096
    """Directions of the shape term, redrawn at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_final_relu(self.projector)
        if not 0 <= self.visreg_weight <= 1:
            raise UserError(f"method.visreg_weight={self.visreg_weight} is not in [0, 1]")
        check_weights(self, "scale_weight", "center_weight", "shape_weight")
        check_counts(self, "num_slices")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "VISReg":
        return VISReg(self, key=key)

    def tiny(self) -> "VISRegConfig":
        return replace(super().tiny(), num_slices=16)


class VISReg(MultiView):
    """VISReg, with the equations at the top of this file."""

    config: VISRegConfig = eqx.field(static=True)

    def objective(self, outputs: Embeddings, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups, c = self.project(outputs), self.config
        z = jnp.concatenate(groups)  # (V, B, D)

        # Views of an image agree.
        inv = invariance_loss(groups)

        # Deviation 1, mean 0, and normal along any direction: each of one view's batch, then the mean over views.
        directions = random_unit_directions(key, z.shape[2], c.num_slices)
        scale = jnp.mean(jax.vmap(visreg.scale_term)(z))
        center = jnp.mean(jax.vmap(visreg.center_term)(z))
        shape = jnp.mean(jax.vmap(lambda z_v: visreg.shape_term(z_v, directions))(z))

        loss = (1 - c.visreg_weight) * inv + c.visreg_weight * (
            c.scale_weight * scale + c.center_weight * center + c.shape_weight * shape
        )
        terms = {
            "train/invariance_loss": inv,
            "train/scale_loss": scale,
            "train/center_loss": center,
            "train/shape_loss": shape,
        }
        return loss, view_metrics(outputs, groups) | terms
