"""The contract of a planner: find a sequence of actions with a low cost.

    start = planner.cold_start(action_dim)            # zeros
    plan  = planner.plan(cost, key, start=start)      # plan.actions: (horizon, action_dim)
    start = warm_start(plan.actions, executed=1)      # receding horizon: the rest of this plan begins the next

A planner knows neither models nor environments: `cost` contains both. It plans for one episode; everything is pure and
of fixed shape, so a caller runs hundreds of episodes in one program:

    def plan_one(image, goal, key, start):
        return planner.plan(lambda actions: model_cost(image, goal, actions), key, start=start)

    plans = jax.jit(jax.vmap(plan_one))(images, goals, keys, starts)

Memory is then episodes x `num_samples` rollouts of the model; `lax.map` over groups of episodes bounds it.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import UserError, check_fields

Actions = Float[Array, "horizon action"]
Candidates = Float[Array, "samples horizon action"]
Costs = Float[Array, "samples"]

Cost = Callable[[Candidates], Costs]
"""Cost of each candidate, lower is better. One candidate's cost does not depend on the others, nor on their number."""
Bounds = tuple[ArrayLike, ArrayLike]
"""Smallest and largest value of an action: two numbers, or two arrays that broadcast to (horizon, action)."""


class Plan(eqx.Module):
    """What a planner found."""

    actions: Actions
    cost: Float[Array, ""]
    """Cost of `actions`; the largest finite number if it is not finite. Under `jit` it costs nothing if not used."""
    lowest_costs: Float[Array, "iterations"]
    """Lowest cost among the candidates of each iteration: the curve of the search."""


@dataclass(frozen=True)
class Planner(abc.ABC):
    """Settings that every planner has. Defaults are those published for LeWorldModel."""

    horizon: int = 5
    """Actions in a plan; with frame skip, each is a block of environment actions."""
    num_samples: int = 300
    """Candidates evaluated together. More find a lower cost; memory and time grow with them."""
    num_iterations: int = 30
    """Evaluations of `num_samples` candidates. They are sequential: time grows with them, memory does not."""
    initial_std: float = 1.0
    """Standard deviation of the first candidates around `start`, in the unit of the actions."""

    def __post_init__(self) -> None:
        check_fields("planner", self, "at least 1", "horizon", "num_samples", "num_iterations")
        check_fields("planner", self, "above 0", "initial_std")

    def cold_start(self, action_dim: int) -> Actions:
        """Zeros, the `start` of an episode's first plan: the mean action where actions are standardized."""
        return jnp.zeros((self.horizon, action_dim))

    def plan(self, cost: Cost, key: PRNGKeyArray, *, start: Actions, bounds: Bounds | None = None) -> Plan:
        """The best actions that the search finds from `start`; all arithmetic is in the type of `start`.

        `start` also gives the width of an action. With `bounds`, all candidates and the plan are clipped to them;
        None does not clip. A cost that is not finite counts as the largest finite number.

        Raises `UserError` if `start` does not have `horizon` actions.
        """
        if start.shape[0] != self.horizon:
            raise UserError(
                f"start has {start.shape[0]} actions, but planner.horizon={self.horizon}; "
                "make it by cold_start or warm_start"
            )

        def finite_cost(candidates: Candidates) -> Costs:
            costs = cost(candidates).astype(start.dtype)
            return jnp.where(jnp.isfinite(costs), costs, jnp.finfo(start.dtype).max)

        return self.search(finite_cost, key, clip_to(start, bounds), bounds)

    @abc.abstractmethod
    def search(self, cost: Cost, key: PRNGKeyArray, start: Actions, bounds: Bounds | None) -> Plan:
        """What a planner defines: `plan`, with costs that are finite and a `start` inside the bounds."""

    def draw_noise(self, key: PRNGKeyArray, start: Actions) -> Candidates:
        """Standard normal noise for `num_samples` candidates of the shape and type of `start`."""
        # Drawn as one row: the same numbers, in a program that XLA compiles about four times faster on a CPU.
        return jr.normal(key, (self.num_samples * start.size,), start.dtype).reshape(-1, *start.shape)


def warm_start(actions: Actions, executed: int) -> Actions:
    """The next plan's `start`: the actions that follow the first `executed` ones, then zeros."""
    return jnp.concatenate([actions[executed:], jnp.zeros_like(actions[:executed])])


def clip_to(actions: Float[Array, "*samples horizon action"], bounds: Bounds | None) -> Array:
    """The actions inside the bounds; unchanged if there are none."""
    if bounds is None:
        return actions
    low, high = (jnp.asarray(bound, actions.dtype) for bound in bounds)
    return jnp.clip(actions, low, high)


def candidates_around(mean: Actions, std: Actions, noise: Candidates, bounds: Bounds | None = None) -> Candidates:
    """Candidates noise * std + mean, clipped to the bounds; the first one is the mean itself."""
    return clip_to((noise * std + mean).at[0].set(mean), bounds)


Best = tuple[Actions, Float[Array, ""]]
"""The best actions so far, and their cost."""


def no_best(start: Actions) -> Best:
    """Before the first evaluation: `start`, which any candidate replaces."""
    return start, jnp.asarray(jnp.inf, start.dtype)


def keep_best(best: Best, candidates: Candidates, costs: Costs) -> Best:
    """The cheapest candidate, or `best` if none is cheaper."""
    actions, lowest = best
    i = jnp.argmin(costs)
    return jnp.where(costs[i] < lowest, candidates[i], actions), jnp.minimum(costs[i], lowest)
