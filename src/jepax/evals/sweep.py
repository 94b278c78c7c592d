"""The programs of a sweep of linear heads over several inputs: its statistics, its passes, and its answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.evals.heads import Heads, Layers, Moments, Rule, Settings, add, hits, inputs_of, logits, train_step
from jepax.types import AnyArray

CHUNK = 2048
"""Examples looked at together where nothing is trained; bounds memory, changes no number."""
STEP_EPOCHS, STEP_FACTOR = 15, 0.1
State = dict[str, tuple[Heads, optax.OptState]]
"""Heads and their optimisers, by input."""


class Basis(NamedTuple):
    """What stands still while the heads of a sweep are trained."""

    settings: Settings
    moments: dict[str, Moments]
    """By input."""
    maps: dict[str, Float[AnyArray, "inputs outputs"]]
    """Of the controls."""


@dataclass(frozen=True)
class Course:
    """The rule of the updates, and how the rate falls."""

    rule: Rule
    schedule: Literal["cosine", "step"]
    epochs: int
    steps: int
    """Updates in an epoch."""
    batch_size: int

    def share(self, count: Int[Array, ""]) -> Float[Array, ""]:
        """Of the learning rate, at an update."""
        if self.schedule == "cosine":
            return optax.cosine_decay_schedule(1.0, self.epochs * self.steps)(count)
        return STEP_FACTOR ** (count // (STEP_EPOCHS * self.steps))


def chunks(layers: Float[np.ndarray, "layers n dim"]) -> Iterator[tuple[Float[np.ndarray, "layers chunk dim"], int]]:
    """Pieces of one length, the last filled up with zeros, each with its number of real rows."""
    count = layers.shape[1]
    size = min(CHUNK, count)
    for start in range(0, count, size):
        part = layers[:, start : start + size]
        valid = part.shape[1]
        yield np.pad(part, ((0, 0), (0, size - valid), (0, 0))) if valid < size else part, valid


@jax.jit
def add_moments(
    moments: dict[str, Moments], layers: Layers, valid: Bool[AnyArray, "batch"], maps: dict[str, Array]
) -> dict[str, Moments]:
    """With those of a batch."""
    inputs = inputs_of(layers, tuple(moments), maps)
    return {name: add(moments[name], inputs[name], valid) for name in moments}


@partial(jax.jit, static_argnames=("course",), donate_argnames=("state",))
def one_step(state: State, layers: Layers, labels: Int[AnyArray, "batch"], basis: Basis, *, course: Course) -> State:
    """One update of every head of every input."""
    inputs = inputs_of(layers, tuple(state), basis.maps)
    return {
        name: train_step(course.rule, course.share, carry, basis.settings, basis.moments[name], inputs[name], labels)
        for name, carry in state.items()
    }


@partial(jax.jit, static_argnames=("course",), donate_argnames=("state",))
def cached_pass(
    state: State,
    layers: Float[Array, "layers n dim"],
    labels: Int[AnyArray, "n"],
    key: PRNGKeyArray,
    basis: Basis,
    *,
    course: Course,
) -> State:
    """One pass over cached features in the key's order: one program, whatever the number of heads.

    The examples of the last, incomplete batch are left out.
    """
    order = jr.permutation(key, len(labels))[: course.steps * course.batch_size]

    def step(state: State, batch: Int[Array, "batch"]) -> tuple[State, None]:
        return one_step(state, layers[:, batch], labels[batch], basis, course=course), None

    return jax.lax.scan(step, state, order.reshape(course.steps, course.batch_size))[0]


@jax.jit
def count_hits(
    state: State, layers: Layers, labels: Int[AnyArray, "batch"], basis: Basis
) -> dict[str, Int[Array, "heads"]]:
    """How many examples each head gets right; a label of -1 is no one's."""
    inputs = inputs_of(layers, tuple(state), basis.maps)
    values = {
        name: logits(heads, basis.settings, basis.moments[name], inputs[name]) for name, (heads, _) in state.items()
    }
    return {name: hits(values[name], labels).sum(0) for name in values}


@partial(jax.jit, static_argnames=("name",))
def head_values(
    layers: Layers, heads: Heads, settings: Settings, basis: Basis, *, name: str
) -> Float[Array, "batch classes"]:
    """Logits of one head, kept as a sweep of one, on the input of that name."""
    return logits(heads, settings, basis.moments[name], inputs_of(layers, (name,), basis.maps)[name])[:, 0]
