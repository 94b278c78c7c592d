"""Gradient descent on the actions, through the model (for example Henaff et al. 2017, arXiv:1705.07177).

    candidates    = noise * initial_std + start, the first one replaced by start
    repeat          candidates <- Adam(candidates, gradient of their costs)

The plan is the cheapest candidate of all iterations. `cost` is differentiable in the actions.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.planners.base import (
    Actions,
    Bounds,
    Candidates,
    Cost,
    Costs,
    Plan,
    Planner,
    candidates_around,
    clip_to,
    keep_best,
    no_best,
)


@dataclass(frozen=True)
class GradientPlanner(Planner):
    """Adam on several plans at once; the best one is the plan.

    An iteration costs a backward pass too, whose memory is that of all activations of the rollouts.
    """

    num_samples: int = 30
    """Random starts, optimized together. More make it likelier that one leads to a good minimum."""
    num_iterations: int = 100
    """Evaluations of every start; one fewer updates, since the last ones are evaluated."""
    learning_rate: float = 0.1
    """Step size of Adam: about the largest change of an action in one update, in the unit of the actions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("planner", self, "above 0", "learning_rate")

    def search(self, cost: Cost, key: PRNGKeyArray, start: Actions, bounds: Bounds | None) -> Plan:
        adam = optax.adam(self.learning_rate)

        # The gradient of the sum has the gradient of each candidate's own cost.
        def total_cost(candidates: Candidates) -> tuple[Float[Array, ""], Costs]:
            costs = cost(candidates)
            return jnp.sum(costs), costs

        def iterate(state: tuple, _: None) -> tuple[tuple, Float[Array, ""]]:
            candidates, adam_state, best = state
            grads, costs = jax.grad(total_cost, has_aux=True)(candidates)
            best = keep_best(best, candidates, costs)

            # Adam works number by number, so no start influences another one.
            updates, adam_state = adam.update(grads, adam_state)
            candidates = clip_to(optax.apply_updates(candidates, updates), bounds)
            return (candidates, adam_state, best), jnp.min(costs)

        noise = self.draw_noise(key, start)
        candidates = candidates_around(start, jnp.full_like(start, self.initial_std), noise, bounds)
        state = candidates, adam.init(candidates), no_best(start)
        (_, _, best), lowest_costs = lax.scan(iterate, state, length=self.num_iterations)
        return Plan(*best, lowest_costs)
