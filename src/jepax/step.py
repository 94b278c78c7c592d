"""One step, from a batch to the next state, and the program that runs it: read this first."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jepax.guard import Guard, GuardConfig, kept, only_if
from jepax.methods import AbstractMethod, MethodConfig
from jepax.optim import Optimizer
from jepax.trees import cast, norm, norms_by_layer, trainable
from jepax.types import Images, Metrics

USUAL = GuardConfig()


class TrainState(eqx.Module):
    """All that a step changes, and all that a checkpoint holds."""

    method: AbstractMethod
    opt_state: optax.OptState
    step: Int[Array, ""]
    guard: Guard


def init_state(method: AbstractMethod, optimizer: Optimizer) -> TrainState:
    """The state before step 0. Only trainable parameters get optimiser state."""
    params = eqx.filter(method, trainable(method))
    return TrainState(method=method, opt_state=optimizer.init(params), step=jnp.int32(0), guard=Guard.new())


@eqx.filter_jit
def build_method(config: MethodConfig, steps: int, key: PRNGKeyArray) -> AbstractMethod:
    """The method before its first step. One program: one operation at a time takes ten times longer."""
    return config.build(total_steps=steps, key=key)


@eqx.filter_jit
def first_state(config: MethodConfig, optimizer: Optimizer, key: PRNGKeyArray) -> TrainState:
    """The state before step 0 of the method of this key; one program for every seed."""
    return init_state(build_method(config, optimizer.total_steps, key), optimizer)


def predictor_norms(grads: PyTree) -> Metrics:
    """Gradient norms of a predictor, where there is one, and of its blocks, where it is made of blocks."""
    if grads is None:
        return {}
    blocks = {"grad_norm_predictor_by_block": norms_by_layer(grads.stack.blocks)} if hasattr(grads, "stack") else {}
    return {"grad_norm_predictor": norm(grads)} | blocks


def loss_and_gradients(
    method: AbstractMethod, images: Images, key: PRNGKeyArray, compute: DTypeLike
) -> tuple[Float[Array, ""], Metrics, AbstractMethod]:
    """Loss, metrics, and the loss's gradients by the trained parameters."""
    params, rest = eqx.partition(method, trainable(method))

    def loss_of(params: AbstractMethod) -> tuple[Array, Metrics]:
        return cast(eqx.combine(params, rest), compute).loss(images, key=key)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, metrics, grads


def train_step(
    optimizer: Optimizer,
    state: TrainState,
    images: Images,
    root: PRNGKeyArray,
    compute: DTypeLike = jnp.float32,
    guard: GuardConfig = USUAL,
) -> tuple[TrainState, Metrics]:
    """One update: loss and gradients over the global batch, AdamW, then what gradients do not change.

    Everything random comes from `fold_in(root, step)`, and an example's own part from its index in the run's order:
    the same on any number of workers, devices or hosts. A step that the guard refuses changes nothing but `step`.
    """
    loss, metrics, grads = loss_and_gradients(state.method, images, jr.fold_in(root, state.step), compute)
    size = norm(grads)
    verdict = state.guard.judge(guard, loss, size)
    scale = state.guard.scale(guard, verdict, size)
    remembered = state.guard.after(verdict, size, state.step)
    arrays, static = eqx.partition((state.method, state.opt_state), eqx.is_array)

    def update(arrays: PyTree) -> tuple[PyTree, Metrics]:
        method, opt_state = eqx.combine(arrays, static)
        params, rest = eqx.partition(method, trainable(method))
        scaled = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(scaled, opt_state, params, state.step)
        method, moved = eqx.combine(eqx.apply_updates(params, updates), rest).after_update(state.step)
        return eqx.filter((method, opt_state), eqx.is_array), moved | {"update_norm": norm(updates)}

    arrays, moved = only_if(kept(verdict), update, arrays)
    method, opt_state = eqx.combine(arrays, static)
    metrics |= moved | {
        "loss": loss,
        "learning_rate": optimizer.learning_rate(state.step),
        "weight_decay": optimizer.weight_decay(state.step),
        "grad_norm": size,
        "grad_norm_encoder_by_block": norms_by_layer(grads.encoder.stack.blocks),
        **predictor_norms(getattr(grads, "predictor", None)),
        "verdict": verdict,
        "grad_norm_limit": state.guard.limit(guard),
        "in_a_row": remembered.in_a_row,
        "unused_steps": remembered.unused,
    }
    return TrainState(method=method, opt_state=opt_state, step=state.step + 1, guard=remembered), metrics


@partial(jax.jit, static_argnames=("optimizer", "rest", "compute", "guard"), donate_argnames=("arrays",))
def step_program(
    arrays: PyTree,
    images: Images,
    root: PRNGKeyArray,
    *,
    optimizer: Optimizer,
    rest: PyTree,
    compute: DTypeLike,
    guard: GuardConfig,
) -> tuple[PyTree, Metrics]:
    """The training program of a run, compiled once: `step_program._cache_size()` counts. Donates the old state.

    Plain `jax.jit`, not `eqx.filter_jit`, which waits for every result and so would keep an accelerator idle.
    """
    state, metrics = train_step(optimizer, eqx.combine(arrays, rest), images, root, compute, guard)
    return eqx.filter(state, eqx.is_array), metrics


def compiled_step(
    inputs: tuple[Optimizer, PRNGKeyArray, DTypeLike, GuardConfig], images: Images, state: TrainState
) -> tuple[TrainState, Metrics]:
    """`train_step` as one program; the old state's buffers become the new one's."""
    optimizer, root, compute, guard = inputs
    arrays, rest = eqx.partition(state, eqx.is_array)
    arrays, metrics = step_program(arrays, images, root, optimizer=optimizer, rest=rest, compute=compute, guard=guard)
    return eqx.combine(arrays, rest), metrics
