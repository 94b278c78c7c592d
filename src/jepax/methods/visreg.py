"""VISReg (Wu et al. 2026, arXiv:2606.02572): views agree; scale, center and shape of their projections are regularized.

    inv  = mean over views v of |z_v - mean over global views of z|^2 / dim
    loss = (1 - w) inv + w mean over views of [ a scale(z_v) + b center(z_v) + c shape(z_v) ]

The three terms are in `objectives/visreg.py`.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.methods.multiview import Embeddings, MultiView, MultiViewConfig, invariance_loss, view_metrics
from jepax.objectives import visreg
from jepax.objectives.slicing import random_unit_directions
from jepax.types import Metrics


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
        check_fields("method", self, "in [0, 1]", "visreg_weight")
        check_fields("method", self, "at least 0", "scale_weight", "center_weight", "shape_weight")
        check_fields("method", self, "at least 1", "num_slices")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "VISReg":
        return VISReg(self, key=key)


class VISReg(MultiView):
    """VISReg, with the equations at the top of this file."""

    config: VISRegConfig = eqx.field(static=True)

    def objective(self, outputs: Embeddings, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups, c = self.project(outputs), self.config
        z = jnp.concatenate(groups)  # (V, B, D)

        # Views of an image agree.
        inv = invariance_loss(groups)

        # Each view's projections have deviation 1 and mean 0, and are normal along any direction.
        directions = random_unit_directions(key, z.shape[2], c.num_slices)
        scale = jnp.mean(jax.vmap(visreg.scale_term)(z))
        center = jnp.mean(jax.vmap(visreg.center_term)(z))
        shape = jnp.mean(jax.vmap(lambda z_v: visreg.shape_term(z_v, directions))(z))

        # w divides the loss between invariance and regularizer; the three weights are within the regularizer.
        penalty = c.scale_weight * scale + c.center_weight * center + c.shape_weight * shape
        loss = (1 - c.visreg_weight) * inv + c.visreg_weight * penalty
        terms = {"invariance": inv, "scale": scale, "center": center, "shape": shape}
        return loss, view_metrics(outputs, groups) | {f"train/{name}_loss": term for name, term in terms.items()}
