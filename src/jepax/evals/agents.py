"""Agents that planning compares: a policy, or a planner with a cost by a model or by the world itself.

An agent is a tree of arrays, so that models of one size share a program.
"""

import abc
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.envs import Environment, Policy
from jepax.envs.base import Action, State
from jepax.methods.base import WorldModel
from jepax.planners import Cost, Planner


@dataclass(frozen=True)
class ActionScale:
    """Blocks of standardized actions, as models and planners see them, and the environment's actions."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    frame_skip: int
    """Actions in a block, side by side."""

    @property
    def block(self) -> int:
        """Numbers in a block."""
        return self.frame_skip * len(self.mean)

    def to_env(self, blocks: Float[Array, "horizon block"]) -> Float[Array, "_steps action"]:
        """The single actions of a plan, in the environment's unit."""
        actions = blocks.reshape(len(blocks) * self.frame_skip, len(self.mean))
        return actions * jnp.asarray(self.std) + jnp.asarray(self.mean)


class Agent(eqx.Module):
    """Chooses actions."""

    @abc.abstractmethod
    def __call__(
        self, state: State, goal: State, last_action: Action, key: PRNGKeyArray
    ) -> Float[Array, "_steps action"]:
        """The next actions, in the environment's unit; as many of them each time."""


class PolicyAgent(Agent):
    """A policy chooses one action at a time."""

    env: Environment
    policy: Policy

    def __call__(
        self, state: State, goal: State, last_action: Action, key: PRNGKeyArray
    ) -> Float[Array, "_steps action"]:
        return self.policy(self.env, state, goal, last_action, key)[None]


class GoalCost(eqx.Module):
    """Makes the cost of candidates for a state and a goal."""

    @abc.abstractmethod
    def __call__(self, state: State, goal: State) -> Cost: ...


class PlannerAgent(Agent):
    """Plans from the current state, and executes the whole plan before it plans again."""

    planner: Planner = eqx.field(static=True)
    scale: ActionScale = eqx.field(static=True)
    cost: GoalCost

    def __call__(
        self, state: State, goal: State, last_action: Action, key: PRNGKeyArray
    ) -> Float[Array, "_steps action"]:
        start = self.planner.cold_start(self.scale.block)
        return self.scale.to_env(self.planner.plan(self.cost(state, goal), key, start=start).actions)


class ModelCost(GoalCost):
    """Squared distance of the last predicted embedding from the goal's. The model sees two images, nothing else."""

    env: Environment
    model: WorldModel
    window: int = eqx.field(static=True, default=1)

    def __call__(self, state: State, goal: State) -> Cost:
        z, z_goal = self.model.embed(jnp.stack([self.env.render(state), self.env.render(goal)]))

        def cost(candidates: Float[Array, "samples horizon block"]) -> Float[Array, "samples"]:
            no_past = jnp.zeros((0, candidates.shape[-1]))
            return goal_cost(self.model.rollout(z[None], no_past, candidates, self.window), z_goal)

        return cost


def goal_cost(
    embeddings: Float[Array, "candidates frames dim"], goal: Float[Array, "dim"]
) -> Float[Array, "candidates"]:
    """Squared distance, summed over dimensions, of each candidate's last embedding from the goal's."""
    return jnp.sum(jnp.square(embeddings[:, -1] - goal), axis=-1)


class TrueCost(GoalCost):
    """The squared distance from the goal after the plan, by the environment itself: the ceiling of a planner."""

    env: Environment
    scale: ActionScale = eqx.field(static=True)

    def __call__(self, state: State, goal: State) -> Cost:
        def final_distance(candidate: Float[Array, "horizon block"]) -> Float[Array, ""]:
            def step(state: State, action: Action) -> tuple[State, None]:
                return self.env.step(state, action, jr.key(0)), None

            return self.env.distance(lax.scan(step, state, self.scale.to_env(candidate))[0], goal) ** 2

        return jax.vmap(final_distance)
