"""KerJEPA (Zimmermann et al. 2025, arXiv:2512.19605): LeJEPA with a kernel discrepancy in place of SIGReg.

    inv  = mean over views v of |z_v - mean over global views of z|^2 / dim
    loss = (1 - w) inv + w B mean over views of D^2(z_v, N(0, I))

D is the maximum mean discrepancy or the kernel Stein discrepancy of the batch of B projections to a standard normal, in
closed form: without SIGReg's random directions and their noise in the gradient. Like SIGReg's statistic, B D^2 does not
depend on the batch size for samples of the normal, and grows with B away from it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.methods.multiview import Embeddings, MultiView, MultiViewConfig, invariance_loss, view_metrics
from jepax.objectives.kernel_discrepancy import Kernel, ksd, mmd_gaussian
from jepax.types import Metrics, UserError


@dataclass(frozen=True)
class KerJEPAConfig(MultiViewConfig, name="kerjepa"):
    """KerJEPA: a discrepancy, its kernel and bandwidth."""

    discrepancy: Literal["mmd", "ksd"] = "mmd"
    """Maximum mean discrepancy, or kernel Stein discrepancy."""
    kernel: Kernel = "gaussian"
    """Gaussian, or inverse multiquadric (imq, only with ksd: its mmd has no closed form)."""
    bandwidth: float | None = None
    """Bandwidth h of the kernel; None: the square root of the projections' dimension."""
    kernel_weight: float = 0.05
    """Fraction w of the discrepancy in the loss; the invariance has 1 - w."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("method", self, "in [0, 1]", "kernel_weight")
        check_fields("method", self, "above 0", "bandwidth")
        if self.discrepancy == "mmd" and self.kernel == "imq":
            raise UserError("method.kernel=imq has no closed form for method.discrepancy=mmd; try ksd")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "KerJEPA":
        return KerJEPA(self, key=key)


class KerJEPA(MultiView):
    """KerJEPA, with the equations at the top of this file."""

    config: KerJEPAConfig = eqx.field(static=True)

    def discrepancy(self, z: Float[Array, "batch dim"]) -> Float[Array, ""]:
        """B D^2 of one view's projections."""
        # Points of a standard normal are about sqrt(dim) from 0: with that bandwidth the kernel is neither 0 nor 1.
        c = self.config
        bandwidth = math.sqrt(z.shape[1]) if c.bandwidth is None else c.bandwidth
        d2 = mmd_gaussian(z, bandwidth) if c.discrepancy == "mmd" else ksd(z, c.kernel, bandwidth)
        return len(z) * d2

    def objective(self, outputs: Embeddings, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups, w = self.project(outputs), self.config.kernel_weight

        # Views of an image agree.
        inv = invariance_loss(groups)

        # Each view's projections are a standard normal. Nothing is drawn: `key` is not used.
        kernel_loss = jnp.mean(jax.vmap(self.discrepancy)(jnp.concatenate(groups)))

        loss = (1 - w) * inv + w * kernel_loss
        return loss, view_metrics(outputs, groups) | {"train/invariance_loss": inv, "train/kernel_loss": kernel_loss}
