"""The trainer of heads: one update and one loop for the linear, the attentive and the fine-tuning protocol.

A `HeadTask` defines what is trained: its parameters, its frozen inputs and its loss. Many heads that differ in their
hyper-parameters are trained by one program, on the same batches, each as if it were alone.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jepax import schedules
from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.distributed.sharding import shard_if_possible
from jepax.evals.programs import eval_jit
from jepax.evals.scoring import ProtocolData
from jepax.optim import weight_decay_mask
from jepax.types import AnyArray

OptimizerName = Literal["adamw", "lars"]
LARS_TRUST = 1e-3
"""LARS's trust coefficient (You et al. 2017, arXiv:1708.03888)."""
LARS_MOMENTUM = 0.9
STEP_EPOCHS, STEP_FACTOR = 15, 0.1
"""The step schedule multiplies the learning rate by the factor after so many epochs."""


@dataclass(frozen=True)
class TrainSchedule:
    """Optimizer and learning rate schedule of a training."""

    optimizer: OptimizerName
    shape: Literal["cosine", "step", "warmup_cosine"]
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int = 0

    def factor(self, count: Int[AnyArray, ""]) -> Float[Array, ""]:
        """Multiplies the peak learning rate at an update counted from 0."""
        if self.shape == "cosine":
            return optax.cosine_decay_schedule(1.0, self.total_steps)(count)
        if self.shape == "step":
            return STEP_FACTOR ** (count // (STEP_EPOCHS * self.steps_per_epoch))
        warmup, total = self.warmup_steps, self.total_steps + 1
        return schedules.warmup_cosine(count + 1, start=0.0, peak=1.0, final=0.0, warmup=warmup, total=total)


def warmup_schedule(epochs: int, batch_size: int, warmup: float, examples: int) -> TrainSchedule:
    """AdamW with a linear warm-up, in a fraction of the steps, and a cosine decay. Batches may span two epochs."""
    size = min(batch_size, examples)
    steps = epochs * examples // size
    return TrainSchedule("adamw", "warmup_cosine", size, examples // size, steps, round(warmup * steps))


class HeadHparams(NamedTuple):
    """Hyper-parameters: one value for each head of a sweep, or a scalar if there is one head without that axis."""

    learning_rate: Float[AnyArray, "*heads"]
    weight_decay: Float[AnyArray, "*heads"]


class HeadTask(eqx.Module):
    """A kind of head, as the trainer uses it. Arrays of the task are constants of the training."""

    hparams: eqx.AbstractVar[HeadHparams]
    schedule: eqx.AbstractVar[TrainSchedule]

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray) -> PyTree:
        """Initial parameters. Arrays have the leading axis of `hparams`."""

    @abc.abstractmethod
    def inputs(self, batch: PyTree, key: PRNGKeyArray) -> PyTree:
        """Compute the frozen part of the forward pass, once for all heads: `losses` applies the parameters to it."""

    @abc.abstractmethod
    def losses(self, params: PyTree, inputs: PyTree, labels: Int[Array, "batch"]) -> Float[Array, "*heads"]:
        """Mean loss of the batch for each head."""

    def lr_scale(self, params: PyTree) -> PyTree:
        """A factor of the learning rate for each array of the parameters."""
        return jax.tree.map(lambda _: 1.0, params)


class HeadsState(eqx.Module):
    """Everything that an update changes: parameters and optimizer state of all heads."""

    params: PyTree
    opt_state: optax.OptState


def make_head_optimizer(schedule: TrainSchedule, hparams: HeadHparams) -> optax.GradientTransformation:
    """Optimizer of one head. Weight decay and LARS's trust ratio apply to weight matrices only, as in SimCLR."""
    decay = optax.add_decayed_weights(hparams.weight_decay, weight_decay_mask)
    rate = optax.scale_by_schedule(lambda count: -hparams.learning_rate * schedule.factor(count))
    if schedule.optimizer == "adamw":
        return optax.chain(optax.scale_by_adam(), decay, rate)
    trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=LARS_TRUST), weight_decay_mask)
    return optax.chain(decay, trust, rate, optax.trace(LARS_MOMENTUM))


def _per_head(function: Callable, hparams: HeadHparams) -> Callable:
    """`function` for each head, if there is an axis of heads."""
    return jax.vmap(function) if jnp.ndim(hparams.learning_rate) else function


@eval_jit
def init_heads(task: HeadTask, key: PRNGKeyArray) -> HeadsState:
    """Parameters of all heads before the first update, each with its own optimizer state."""
    params = task.init(key)
    init = _per_head(lambda head, hparams: make_head_optimizer(task.schedule, hparams).init(head), task.hparams)
    return HeadsState(params, init(params, task.hparams))


def _step(
    state: HeadsState, task: HeadTask, batch: PyTree, labels: Int[AnyArray, "batch"], key: PRNGKeyArray
) -> tuple[HeadsState, Float[Array, "*heads"]]:
    """One update of every head, and the losses before it."""
    inputs = task.inputs(batch, key)

    # No term of the summed loss contains two heads, so each is trained as if it were alone.
    def total(params: PyTree) -> tuple[Float[Array, ""], Float[Array, "*heads"]]:
        losses = task.losses(params, inputs, labels)
        return losses.sum(), losses

    # The optimizer is per head, since its hyper-parameters are; `lr_scale` is for layers of a fine-tuned encoder.
    def update(params: PyTree, grads: PyTree, opt_state: optax.OptState, hparams: HeadHparams) -> tuple:
        updates, opt_state = make_head_optimizer(task.schedule, hparams).update(grads, opt_state, params)
        updates = jax.tree.map(jnp.multiply, updates, task.lr_scale(params))
        return optax.apply_updates(params, updates), opt_state

    grads, losses = jax.grad(total, has_aux=True)(state.params)
    update = _per_head(update, task.hparams)
    return HeadsState(*update(state.params, grads, state.opt_state, task.hparams)), losses


train_heads_step = jax.jit(_step, donate_argnames=("state",), compiler_options=COMPILER_OPTIONS)


@partial(eval_jit, donate_argnames=("state",))
def train_cached_epoch(
    state: HeadsState,
    task: HeadTask,
    features: PyTree,
    labels: Int[AnyArray, "n"],
    key: PRNGKeyArray,
) -> HeadsState:
    """One pass over cached features, in the key's order. The examples of the last, incomplete batch are left out.

    - `features`: arrays (..., n, dim).
    """
    steps, size = task.schedule.steps_per_epoch, task.schedule.batch_size
    order = jr.permutation(key, len(labels))[: steps * size]

    def step(state: HeadsState, rows: Int[Array, "batch"]) -> tuple[HeadsState, None]:
        batch = jax.tree.map(lambda x: x[..., rows, :], features)
        return _step(state, task, batch, labels[rows], key)[0], None

    return jax.lax.scan(step, state, order.reshape(steps, size))[0]


def train_on_images(task: HeadTask, data: ProtocolData, title: str) -> PyTree:
    """Trains on shuffled images from the task's initial parameters. Returns the trained ones."""
    key_init, key_order, key_views = jr.split(data.key, 3)
    state, schedule, previous = init_heads(task, key_init), task.schedule, None
    batches = data.train.shuffled(schedule.batch_size, schedule.total_steps, loader_seed(key_order))
    with data.progress.bar(title, schedule.total_steps) as update:
        for count, images in enumerate(batches, 1):
            images = shard_if_possible(images)
            state, losses = train_heads_step(state, task, replace(images, label=None), images.label, key_views)
            # The host is at most one step ahead of the device: otherwise batches would pile up in memory.
            if previous is not None:
                jax.block_until_ready(previous)
            previous = losses
            update(count)
    return state.params


def loader_seed(key: PRNGKeyArray) -> int:
    """Seed of the order of examples."""
    return int(jr.randint(key, (), 0, 2**31 - 1))
