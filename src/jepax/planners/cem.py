"""The cross-entropy method (Rubinstein & Kroese 2004), as LeWorldModel plans with it.

A Gaussian over plans, with one mean and one standard deviation per number, moves to where plans are cheap:

    candidates = noise * std + mean, the first one replaced by the mean
    elites     = the num_elites cheapest candidates
    mean, std  = mean and unbiased standard deviation of the elites

and so on for `num_iterations`. The plan is the last mean. Candidates are not clipped unless bounds are given, neither
mean nor standard deviation is smoothed, and the standard deviation has no lower limit.

Source: the settings and the details are those of LeWorldModel's public code (galilai-group/stable-worldmodel).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.errors import UserError
from jepax.planners.base import Actions, Bounds, Candidates, Cost, Costs, Plan, Planner, candidates_around, clip_to


class Iteration(NamedTuple):
    """One iteration: what was tried, and the Gaussian after it."""

    candidates: Candidates
    costs: Costs
    elites: Int[Array, "elites"]
    """Indices of the elites, cheapest first."""
    mean: Actions
    std: Actions


@dataclass(frozen=True)
class CEM(Planner):
    """Cross-entropy method: repeatedly fit a Gaussian to its cheapest samples."""

    num_elites: int = 30
    """Candidates that the Gaussian is fitted to. Fewer converge faster, and more often to a local minimum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.num_elites <= self.num_samples:
            raise UserError(f"planner.num_elites={self.num_elites} must be from 2 to num_samples={self.num_samples}")

    def search(self, cost: Cost, key: PRNGKeyArray, start: Actions, bounds: Bounds | None) -> Plan:
        def refit(gaussian: tuple[Actions, Actions], key: PRNGKeyArray) -> tuple[tuple, Float[Array, ""]]:
            noise = self.draw_noise(key, start)
            step = self.iterate(cost, noise, *gaussian, bounds)
            return (step.mean, step.std), jnp.min(step.costs)

        gaussian = start, jnp.full_like(start, self.initial_std)
        (mean, _), lowest_costs = lax.scan(refit, gaussian, jr.split(key, self.num_iterations))

        # Rounding can put the mean of elites at a bound just outside of it.
        mean = clip_to(mean, bounds)
        return Plan(mean, cost(mean[None])[0], lowest_costs)

    def iterate(
        self, cost: Cost, noise: Candidates, mean: Actions, std: Actions, bounds: Bounds | None = None
    ) -> Iteration:
        """One iteration with given standard normal noise."""
        candidates = candidates_around(mean, std, noise, bounds)
        costs = cost(candidates)
        elites = lax.top_k(-costs, self.num_elites)[1]
        return Iteration(candidates, costs, elites, *self.fit(candidates[elites], costs[elites]))

    def fit(
        self, elites: Float[Array, "elites horizon action"], costs: Float[Array, "elites"]
    ) -> tuple[Actions, Actions]:
        """Mean and standard deviation of the next Gaussian; a variant weighs the elites by their costs."""
        return jnp.mean(elites, axis=0), jnp.std(elites, axis=0, ddof=1)
