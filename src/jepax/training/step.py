"""One training step: forward and backward, optimizer, EMA teacher. Read `methods/ijepa.py` first, then this file.

`loop.py` calls it for each batch; `setup.py` builds its arguments from a config.
"""

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.distributed.sharding import ShardingPlan, gather_params, microbatched
from jepax.methods.base import Method, example_keys, objective_key
from jepax.nn.stack import BlockStack
from jepax.optim import Optimizer
from jepax.training.grad_guard import GradGuardConfig, GradGuardState, compute_if, guarded
from jepax.trees import cast, global_norm, per_layer_norms, trainable
from jepax.types import Metrics


class TrainState(eqx.Module):
    """Everything that a step changes, and everything that a checkpoint stores."""

    method: Method
    opt_state: optax.OptState
    step: Int[Array, ""]
    guard: GradGuardState


class TrainContext(NamedTuple):
    """The static arguments of the step: constant over a run, hashable, part of the compiled program."""

    optimizer: Optimizer
    compute_dtype: DTypeLike = jnp.float32
    guard: GradGuardConfig = GradGuardConfig()
    plan: ShardingPlan | None = None
    """None: one device, one micro-batch."""
    log_every_steps: int = 1
    """Interval of the logged steps, at which the step also computes norms by module."""


def train_step(
    state: TrainState, batch: Any, base_key: PRNGKeyArray, context: TrainContext
) -> tuple[TrainState, Metrics]:
    """One update. All randomness derives from `fold_in(base_key, step)`, and an example's from its index."""
    key = jr.fold_in(base_key, state.step)

    # Forward and backward. The loss reads the global batch.
    loss, metrics, grads = loss_and_grads(state.method, batch, key, context)

    # Optimizer and EMA teacher: see `update` below. `guarded` skips this, or scales the gradients of a spike first.
    def apply(old: tuple[Method, optax.OptState], grads: Method) -> tuple[Method, optax.OptState]:
        return update(*old, grads, state.step, metrics, context.optimizer)

    (method, opt_state), guard, guard_metrics = guarded(apply)(
        (state.method, state.opt_state), grads, loss=loss, step=state.step, guard=state.guard, config=context.guard
    )

    # Metrics. Norms by module cost time on a CPU: they are NaN there at steps that are not logged.
    should_log = is_log_step(state.step, context.log_every_steps, context.optimizer.total_steps)
    metrics |= compute_if(should_log, grad_norms, grads) | guard_metrics
    metrics |= {
        "train/loss": loss,
        "optim/lr": context.optimizer.learning_rate(state.step),
        "optim/weight_decay": context.optimizer.weight_decay(state.step),
    }
    return TrainState(method, opt_state, state.step + 1, guard), metrics


def loss_and_grads(
    method: Method, batch: Any, key: PRNGKeyArray, context: TrainContext
) -> tuple[Float[Array, ""], Metrics, Method]:
    """Loss, metrics, and gradients with respect to the trained parameters.

    The same loss as `Method.loss`, with matrix products in `compute_dtype`, sharded, and in micro-batches.
    """
    # The parameters that are trained, and the rest: everything beneath an EMA, and arrays that are not floating-point.
    params, frozen = eqx.partition(method, trainable(method))
    plan = context.plan

    def loss_of(params: Method) -> tuple[Array, Metrics]:
        # Parameters in the compute dtype; sharded ones are gathered on every device.
        method = gather_params(cast(eqx.combine(params, frozen), context.compute_dtype), plan)

        # draw -> forward -> objective; only `forward` runs in micro-batches.
        views = method.draw(batch, example_keys(key, batch.index))
        forward = microbatched(type(method).forward, plan.num_microbatches if plan else 1)
        return method.objective(forward(method, views), key=objective_key(key))

    # Gradients are float32, as the parameters are: the cast is inside the function that is differentiated.
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, metrics, grads


def update(
    method: Method,
    opt_state: optax.OptState,
    grads: Method,
    step: Int[Array, ""],
    metrics: Metrics,
    optimizer: Optimizer,
) -> tuple[Method, optax.OptState]:
    """Change the parameters by their gradients, then what gradients do not reach."""
    # AdamW or Muon on everything that is not beneath an EMA.
    params, frozen = eqx.partition(method, trainable(method))
    updates, opt_state = optimizer.update(grads, opt_state, params, step)
    method = eqx.combine(eqx.apply_updates(params, updates), frozen)

    # The EMA teacher moves. Its metrics are dropped here and computed only at logged steps: `track_update_norms`.
    method, _ = method.after_update(step, metrics)
    return method, opt_state


@partial(jax.jit, static_argnames=("context",), donate_argnames=("state",), compiler_options=COMPILER_OPTIONS)
def jit_train_step(
    state: TrainState, batch: Any, base_key: PRNGKeyArray, context: TrainContext
) -> tuple[TrainState, Metrics]:
    """The training program of a run, compiled once (`jit_train_step._cache_size()` counts).

    The old state is donated: the new one is written into its memory. Plain `jax.jit`: `eqx.filter_jit` waits for every
    result, so an accelerator would idle, and flattening the state costs a third of the host's time per step.
    """
    state, metrics = train_step(state, batch, base_key, context)

    # The new state is placed as the old one was.
    return context.plan.constrain(state) if context.plan else state, metrics


def run_train_step(
    state: TrainState, batch: Any, base_key: PRNGKeyArray, context: TrainContext
) -> tuple[TrainState, Metrics]:
    """Call `jit_train_step`; an accelerator returns before it has finished."""
    # A CPU first finishes the step before: otherwise both need their temporary memory at the same time.
    if jax.default_backend() == "cpu":
        jax.block_until_ready(state)
    return jit_train_step(state, batch, base_key, context)


def init_train_state(method: Method, optimizer: Optimizer) -> TrainState:
    """The state before step 0. Only trainable parameters get optimizer state.

    Raises `TypeError` if a leaf of the method is neither an array nor a static field.
    """
    # A compiled program accepts only arrays, and a checkpoint stores only arrays.
    for path, leaf in jax.tree_util.tree_leaves_with_path(method):
        if not hasattr(leaf, "dtype"):
            where = jax.tree_util.keystr(path)
            raise TypeError(f"{type(method).__name__}{where} is {leaf!r}, not an array: use eqx.field(static=True)")

    # Everything is trained except what is beneath an EMA.
    params = eqx.filter(method, trainable(method))
    return TrainState(method, optimizer.init(params), jnp.int32(0), GradGuardState.new())


def is_log_step(step: Int[Array, ""] | int, every: int, total: int) -> Bool[Array, ""] | bool:
    """True for the first step, every `every`-th, and the last one: those are written to metrics.jsonl."""
    return (step == 0) | ((step + 1) % every == 0) | (step + 1 == total)


def grad_norms(grads: Method) -> Metrics:
    """Gradient norm of each trained field of the method, and of each block of its transformers, by the field's name."""
    # Frozen fields, such as a teacher, have no gradients and no norm.
    by_field = defaultdict(list)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        by_field[path[0].name].append(grad)
    norms = {f"grad_norm/{name}": global_norm(arrays) for name, arrays in by_field.items()}

    # The blocks of a transformer are stacked on their first axis.
    nodes = jax.tree_util.tree_leaves_with_path(grads, is_leaf=lambda node: isinstance(node, BlockStack))
    stacks = {path: node for path, node in nodes if isinstance(node, BlockStack) and jax.tree.leaves(node)}
    return norms | {f"grad_norm/{_owner(path)}_blocks": per_layer_norms(x.blocks) for path, x in stacks.items()}


def _owner(path: tuple) -> str:
    """Name a stack by the fields above it: `encoder` for the path `.encoder.stack`."""
    return "_".join(str(getattr(entry, "name", getattr(entry, "idx", ""))) for entry in path[:-1])
