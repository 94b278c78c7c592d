"""KerJEPA (Zimmermann et al. 2025, arXiv:2512.19605): LeJEPA with a kernel discrepancy in place of SIGReg.

    inv  = mean over views v of |z_v - mean over global views of z|^2 / dim
    loss = (1 - w) inv + w B mean over views of D^2(z_v, N(0, I))

D is the maximum mean discrepancy or the kernel Stein discrepancy of the batch of B projections to a standard normal, in
closed form: SIGReg's random directions, and the noise that they bring into the gradient, are gone. As SIGReg's
statistic, B D^2 does not depend on the batch size for samples of the normal, and grows with B away from it.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.multiview import (
    Embeddings,
    MultiView,
    MultiViewConfig,
    check_no_final_relu,
    invariance_loss,
    view_metrics,
)
from jepax.objectives.kernel_discrepancy import Kernel, ksd, mmd_gaussian
from jepax.types import Metrics, UserError


@dataclass(frozen=True)
class KerJEPAConfig(MultiViewConfig, name="kerjepa"):
    """KerJEPA: a discrepancy, its kernel and bandwidth."""

    discrepancy: Literal["mmd", "ksd"] = "mmd"
    """Maximum mean discrepancy, or kernel Stein discrepancy."""
    kernel: Kernel = "gaussian"
    """Gaussian, or inverse multiquadric (ksd alone: its mmd has no closed form)."""
    bandwidth: float | None = None
    """Bandwidth h of the kernel; None: the square root of the projections' dimension."""
    kernel_weight: float = 0.05
    """Fraction w of the discrepancy in the loss, the invariance having 1 - w."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_final_relu(self.projector)
        if not 0 <= self.kernel_weight <= 1:
            raise UserError(f"method.kernel_weight={self.kernel_weight} is not in [0, 1]")
        if self.bandwidth is not None and self.bandwidth <= 0:
            raise UserError(f"method.bandwidth={self.bandwidth} must be above 0; None follows the dimension")
        if self.discrepancy == "mmd" and self.kernel == "imq":
            raise UserError("method.kernel=imq has no closed form for method.discrepancy=mmd; try ksd")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "KerJEPA":
        return KerJEPA(self, key=key)

    def tiny(self) -> "KerJEPAConfig":
        return replace(super().tiny(), bandwidth=self.bandwidth)


class KerJEPA(MultiView):
    """KerJEPA: the equation is at the top of this file."""

    config: KerJEPAConfig = eqx.field(static=True)

    def discrepancy(self, z: Float[Array, "batch dim"]) -> Float[Array, ""]:
        """B D^2 of one view's projections."""
        c = self.config
        bandwidth = math.sqrt(z.shape[1]) if c.bandwidth is None else c.bandwidth
        d2 = mmd_gaussian(z, bandwidth) if c.discrepancy == "mmd" else ksd(z, c.kernel, bandwidth)
        return len(z) * d2

    def objective(self, outputs: Embeddings, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups = self.project(outputs)

        # Views of an image agree.
        inv = invariance_loss(groups)

        # Each view's projections are a standard normal. Nothing is drawn: `key` is not used.
        kernel_loss = jnp.mean(jax.vmap(self.discrepancy)(jnp.concatenate(groups)))

        loss = (1 - self.config.kernel_weight) * inv + self.config.kernel_weight * kernel_loss
        return loss, view_metrics(outputs, groups) | {"train/invariance_loss": inv, "train/kernel_loss": kernel_loss}
