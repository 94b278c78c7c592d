"""The contract of an environment: a world that a policy acts in, as pure functions of arrays.

    state, goal = reset(key)                 a random start and a state to reach
    state       = step(state, action, key)   what one action does
    image       = render(state)              what a camera sees

A state is a vector that holds everything about the world, so collecting data, training and planning run under `jit`
and `vmap`, hundreds of episodes at once. An environment is one file.
"""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

State = Float[Array, "state"]
Action = Float[Array, "action"]
Image = UInt8[Array, "height width channels"]


class Environment(eqx.Module):
    """One environment. Its fields are its layout and sizes; nothing in it changes."""

    state_dim: ClassVar[int]
    """Numbers in a state."""
    action_dim: ClassVar[int]
    """Numbers in an action, each in [-1, 1]; larger ones are clipped by `step`."""
    goal_radius: ClassVar[float]
    """A state closer to the goal counts as it, in the unit of `distance`."""
    num_regions: ClassVar[int] = 1
    """Parts of the world, such as rooms; see `region`."""
    image_size: eqx.AbstractVar[int]
    """Height and width of an image, in pixels."""

    @abc.abstractmethod
    def reset(self, key: PRNGKeyArray) -> tuple[State, State]:
        """A random start, and a goal state."""

    @abc.abstractmethod
    def step(self, state: State, action: Action, key: PRNGKeyArray) -> State:
        """The state after one action. `key` is for worlds with chance; the others ignore it."""

    @abc.abstractmethod
    def render(self, state: State) -> Image:
        """The image of a state. A goal is shown as the image of the goal state."""

    @abc.abstractmethod
    def distance(self, state: State, goal: State) -> Float[Array, ""]:
        """How far a state is from the goal, in the environment's own unit."""

    def reached(self, state: State, goal: State) -> Bool[Array, ""]:
        """True if the state counts as the goal."""
        return self.distance(state, goal) < self.goal_radius

    @abc.abstractmethod
    def expert(self, state: State, goal: State) -> Action:
        """An action toward the goal, without noise: the policy that data is collected with, and a ceiling."""

    def region(self, state: State) -> Int[Array, ""]:
        """The part of the world that a state is in, such as a room; 0 everywhere in a world without parts."""
        return jnp.int32(0)


def unit_vector(vector: Float[Array, "dim"]) -> Float[Array, "dim"]:
    """The vector with length 1; zero stays zero."""
    return vector / jnp.maximum(jnp.linalg.norm(vector), jnp.finfo(vector.dtype).tiny)
