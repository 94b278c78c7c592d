"""Random shooting (for example Nagabandi et al. 2018, arXiv:1708.02596): the cheapest of many random plans.

    candidates = noise * initial_std + start, the first one replaced by start

The plan is the cheapest of all num_samples * num_iterations candidates. Nothing is learned between iterations, which
only bound the memory: with the same settings it spends as much as the cross-entropy method, so it is the baseline of
the others.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.planners.base import Actions, Best, Bounds, Cost, Plan, Planner, candidates_around, keep_best, no_best


@dataclass(frozen=True)
class RandomShooting(Planner):
    """The best of `num_samples` random plans in each of `num_iterations`."""

    def search(self, cost: Cost, key: PRNGKeyArray, start: Actions, bounds: Bounds | None) -> Plan:
        def iterate(best: Best, key: PRNGKeyArray) -> tuple[Best, Float[Array, ""]]:
            noise = self.draw_noise(key, start)
            candidates = candidates_around(start, jnp.full_like(start, self.initial_std), noise, bounds)
            costs = cost(candidates)
            return keep_best(best, candidates, costs), jnp.min(costs)

        best, lowest_costs = lax.scan(iterate, no_best(start), jr.split(key, self.num_iterations))
        return Plan(*best, lowest_costs)
