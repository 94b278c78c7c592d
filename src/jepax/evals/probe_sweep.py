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

from jepax.evals.linear_heads import (
    HeadHparams,
    LayerFeatures,
    LinearHeads,
    OptimizerName,
    RunningMoments,
    build_inputs,
    compute_logits,
    is_correct,
    train_heads_step,
    update_moments,
)
from jepax.types import AnyArray

EXAMPLES_PER_CHUNK = 2048
"""Examples looked at together where nothing is trained; bounds memory, changes no number."""
LR_DECAY_EPOCHS, LR_DECAY_FACTOR = 15, 0.1
HeadsByInput = dict[str, tuple[LinearHeads, optax.OptState]]
"""Heads and their optimisers, by input."""


class SweepConstants(NamedTuple):
    """What stands still while the heads of a sweep are trained."""

    settings: HeadHparams
    moments: dict[str, RunningMoments]
    """By input."""
    maps: dict[str, Float[AnyArray, "inputs outputs"]]
    """Of the controls."""


@dataclass(frozen=True)
class TrainSchedule:
    """The rule of the updates, and how the rate falls."""

    rule: OptimizerName
    schedule: Literal["cosine", "step"]
    epochs: int
    steps: int
    """Updates in an epoch."""
    batch_size: int

    def share(self, count: Int[Array, ""]) -> Float[Array, ""]:
        """Of the learning rate, at an update."""
        if self.schedule == "cosine":
            return optax.cosine_decay_schedule(1.0, self.epochs * self.steps)(count)
        return LR_DECAY_FACTOR ** (count // (LR_DECAY_EPOCHS * self.steps))


def split_into_chunks(
    layers: Float[np.ndarray, "layers n dim"],
) -> Iterator[tuple[Float[np.ndarray, "layers chunk dim"], int]]:
    """Pieces of one length, the last filled up with zeros, each with its number of real rows."""
    count = layers.shape[1]
    size = min(EXAMPLES_PER_CHUNK, count)
    for start in range(0, count, size):
        part = layers[:, start : start + size]
        valid = part.shape[1]
        yield np.pad(part, ((0, 0), (0, size - valid), (0, 0))) if valid < size else part, valid


@jax.jit
def update_input_moments(
    moments: dict[str, RunningMoments], layers: LayerFeatures, valid: Bool[AnyArray, "batch"], maps: dict[str, Array]
) -> dict[str, RunningMoments]:
    """With those of a batch."""
    inputs = build_inputs(layers, tuple(moments), maps)
    return {name: update_moments(moments[name], inputs[name], valid) for name in moments}


@partial(jax.jit, static_argnames=("course",), donate_argnames=("state",))
def train_all_inputs_step(
    state: HeadsByInput,
    layers: LayerFeatures,
    labels: Int[AnyArray, "batch"],
    basis: SweepConstants,
    *,
    course: TrainSchedule,
) -> HeadsByInput:
    """One update of every head of every input."""
    inputs = build_inputs(layers, tuple(state), basis.maps)
    return {
        name: train_heads_step(
            course.rule, course.share, carry, basis.settings, basis.moments[name], inputs[name], labels
        )
        for name, carry in state.items()
    }


@partial(jax.jit, static_argnames=("course",), donate_argnames=("state",))
def train_cached_epoch(
    state: HeadsByInput,
    layers: Float[Array, "layers n dim"],
    labels: Int[AnyArray, "n"],
    key: PRNGKeyArray,
    basis: SweepConstants,
    *,
    course: TrainSchedule,
) -> HeadsByInput:
    """One pass over cached features in the key's order: one program, whatever the number of heads.

    The examples of the last, incomplete batch are left out.
    """
    order = jr.permutation(key, len(labels))[: course.steps * course.batch_size]

    def step(state: HeadsByInput, batch: Int[Array, "batch"]) -> tuple[HeadsByInput, None]:
        return train_all_inputs_step(state, layers[:, batch], labels[batch], basis, course=course), None

    return jax.lax.scan(step, state, order.reshape(course.steps, course.batch_size))[0]


@jax.jit
def count_correct(
    state: HeadsByInput, layers: LayerFeatures, labels: Int[AnyArray, "batch"], basis: SweepConstants
) -> dict[str, Int[Array, "heads"]]:
    """How many examples each head gets right; a label of -1 is no one's."""
    inputs = build_inputs(layers, tuple(state), basis.maps)
    values = {
        name: compute_logits(heads, basis.settings, basis.moments[name], inputs[name])
        for name, (heads, _) in state.items()
    }
    return {name: is_correct(values[name], labels).sum(0) for name in values}


@partial(jax.jit, static_argnames=("name",))
def head_logits(
    layers: LayerFeatures, heads: LinearHeads, settings: HeadHparams, basis: SweepConstants, *, name: str
) -> Float[Array, "batch classes"]:
    """Logits of one head, kept as a sweep of one, on the input of that name."""
    return compute_logits(heads, settings, basis.moments[name], build_inputs(layers, (name,), basis.maps)[name])[:, 0]
