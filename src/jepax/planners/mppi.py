"""MPPI, model predictive path integral control (Williams et al. 2017), as PLDM plans with it (arXiv:2502.14819).

The cross-entropy method, except that a cheaper elite counts more. With costs c, the lowest of them c_min,

    w    = softmax(inverse_temperature * (c_min - c))
    mean = sum over elites of w * elite
    std  = sqrt(sum over elites of w * (elite - mean)^2)

Source: weights and settings are those of PLDM's public code (facebookresearch/eb_jepa), which adds the elites and the
fit of the standard deviation to MPPI; Williams et al. weigh all samples and keep the standard deviation.

Differs from the reference: the plan is the last mean, not one elite drawn with the probabilities w; the mean is one
of the candidates; the horizon is LeWorldModel's 5 blocks, not 90 single actions.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jepax.errors import check_fields
from jepax.planners.base import Actions
from jepax.planners.cem import CEM


@dataclass(frozen=True)
class MPPI(CEM):
    """Path integral control: the cross-entropy method with elites weighted by their costs."""

    num_samples: int = 200
    num_iterations: int = 20
    num_elites: int = 20
    initial_std: float = 2.0
    inverse_temperature: float = 0.005
    """How much a lower cost counts, per unit of cost: near 0 all elites count the same; if large, the best one does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("planner", self, "at least 0", "inverse_temperature")

    def fit(
        self, elites: Float[Array, "elites horizon action"], costs: Float[Array, "elites"]
    ) -> tuple[Actions, Actions]:
        """Weighted mean and weighted (biased) standard deviation of the elites."""
        weights = jax.nn.softmax(self.inverse_temperature * (jnp.min(costs) - costs))[:, None, None]
        mean = jnp.sum(weights * elites, axis=0)
        return mean, jnp.sqrt(jnp.sum(weights * jnp.square(elites - mean), axis=0))
