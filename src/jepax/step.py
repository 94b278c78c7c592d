"""One step, from a batch to the next state, and the program that runs it: read this first."""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jepax import sharding
from jepax.costs import tree_bytes
from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.guard import Guard, GuardConfig, kept, measured, only_if
from jepax.methods import Method, MethodConfig
from jepax.optim import Optimizer
from jepax.sharding import Layout, ShardingConfig, current_layout, gather_params, replicate
from jepax.trees import cast, norm, norms_by_layer, trainable
from jepax.types import Images, Metrics

USUAL = GuardConfig()


class TrainState(eqx.Module):
    """All that a step changes, and all that a checkpoint holds."""

    method: Method
    opt_state: optax.OptState
    step: Int[Array, ""]
    guard: Guard


def init_state(method: Method, optimizer: Optimizer) -> TrainState:
    """The state before step 0. Only trainable parameters get optimiser state.

    Raises `TypeError` where a method holds what is neither an array nor static: no program can take it.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(method):
        if not hasattr(leaf, "dtype"):
            where = jax.tree_util.keystr(path)
            raise TypeError(f"{type(method).__name__}{where} is {leaf!r}, no array: mark it eqx.field(static=True)")
    params = eqx.filter(method, trainable(method))
    return TrainState(method=method, opt_state=optimizer.init(params), step=jnp.int32(0), guard=Guard.new())


@eqx.filter_jit
def build_method(config: MethodConfig, steps: int, key: PRNGKeyArray) -> Method:
    """The method before its first step. One program: one operation at a time takes ten times longer."""
    return config.build(total_steps=steps, key=key)


@eqx.filter_jit
def first_state(
    config: MethodConfig, optimizer: Optimizer, key: PRNGKeyArray, layout: Layout | None = None
) -> TrainState:
    """The state before step 0 of the method of this key; one program for every seed. With a layout, no device ever
    holds more of it than its share."""
    state = init_state(build_method(config, optimizer.total_steps, key), optimizer)
    if layout is None:
        return state
    arrays, rest = eqx.partition(state, eqx.is_array)
    return eqx.combine(layout.pinned(arrays), rest)


def layout_of(wanted: ShardingConfig, pieces: int, config: MethodConfig, optimizer: Optimizer, mesh: Mesh) -> Layout:
    """How a run's state lies on these devices, by the setting and the state's size."""
    state = eqx.filter_eval_shape(first_state, config, optimizer, jr.key(0))
    return sharding.layout_of(wanted, mesh, tree_bytes(state), pieces)


def placed_state(config: MethodConfig, optimizer: Optimizer, key: PRNGKeyArray, layout: Layout) -> TrainState:
    """`first_state` on the devices of the layout."""
    if layout.parameters or layout.teacher:
        return first_state(config, optimizer, key, layout)
    return replicate(first_state(config, optimizer, key), layout.mesh)


def norms_by_block(grads: Method) -> Metrics:
    """Gradient norms of the encoder's blocks, of a predictor, and of its blocks, where it is made of blocks."""
    found = {"grad_norm_encoder_by_block": norms_by_layer(grads.encoder.stack.blocks)}
    predictor = getattr(grads, "predictor", None)
    if predictor is None:
        return found
    blocks = (
        {"grad_norm_predictor_by_block": norms_by_layer(predictor.stack.blocks)} if hasattr(predictor, "stack") else {}
    )
    return found | {"grad_norm_predictor": norm(predictor)} | blocks


def told(step: Int[Array, ""] | int, every: int, total: int) -> Bool[Array, ""] | bool:
    """Whether a step gets a line in the log: the first one, every `every`-th, and the last one."""
    return (step == 0) | ((step + 1) % every == 0) | (step + 1 == total)


def loss_and_gradients(
    method: Method, images: Images, key: PRNGKeyArray, compute: DTypeLike
) -> tuple[Float[Array, ""], Metrics, Method]:
    """Loss, metrics, and the loss's gradients by the trained parameters."""
    params, rest = eqx.partition(method, trainable(method))

    def loss_of(params: Method) -> tuple[Array, Metrics]:
        return gather_params(cast(eqx.combine(params, rest), compute), current_layout()).loss(images, key=key)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, metrics, grads


def train_step(
    optimizer: Optimizer,
    state: TrainState,
    images: Images,
    root: PRNGKeyArray,
    compute: DTypeLike = jnp.float32,
    guard: GuardConfig = USUAL,
    log_every: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update: loss and gradients over the global batch, AdamW, then what gradients do not change.

    Everything random comes from `fold_in(root, step)`, and an example's own part from its index in the run's order:
    the same on any number of workers, devices or hosts. A step that the guard refuses changes nothing but `step`.
    Gradient norms by block are no numbers, on a CPU, at steps that get no line; `movement` measures the others.
    """
    loss, metrics, grads = loss_and_gradients(state.method, images, jr.fold_in(root, state.step), compute)
    size = norm(grads)
    verdict = state.guard.judge(guard, loss, size)
    scale = state.guard.scale(guard, verdict, size)
    remembered = state.guard.after(verdict, size, state.step)
    arrays, static = eqx.partition((state.method, state.opt_state), eqx.is_array)

    def update(arrays: PyTree) -> PyTree:
        method, opt_state = eqx.combine(arrays, static)
        params, rest = eqx.partition(method, trainable(method))
        scaled = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(scaled, opt_state, params, state.step)
        method, _ = eqx.combine(eqx.apply_updates(params, updates), rest).after_update(state.step)
        return eqx.filter((method, opt_state), eqx.is_array)

    arrays = only_if(kept(verdict), update, arrays)
    method, opt_state = eqx.combine(arrays, static)
    metrics |= measured(told(state.step, log_every, optimizer.total_steps), norms_by_block, grads)
    metrics |= {
        "loss": loss,
        "learning_rate": optimizer.learning_rate(state.step),
        "weight_decay": optimizer.weight_decay(state.step),
        "grad_norm": size,
        "verdict": verdict,
        "grad_norm_limit": state.guard.limit(guard),
        "in_a_row": remembered.in_a_row,
        "unused_steps": remembered.unused,
    }
    return TrainState(method=method, opt_state=opt_state, step=state.step + 1, guard=remembered), metrics


class Fixed(NamedTuple):
    """What stays the same from a run's first step to its last."""

    optimizer: Optimizer
    root: PRNGKeyArray
    compute: DTypeLike = jnp.float32
    guard: GuardConfig = USUAL
    layout: Layout | None = None
    """None: the state stays where it is."""
    log_every: int = 1


STATIC = ("optimizer", "compute", "guard", "layout", "log_every")


@partial(jax.jit, static_argnames=STATIC, donate_argnames=("state",), compiler_options=COMPILER_OPTIONS)
def step_program(
    state: TrainState,
    images: Images,
    root: PRNGKeyArray,
    *,
    optimizer: Optimizer,
    compute: DTypeLike,
    guard: GuardConfig,
    layout: Layout | None,
    log_every: int,
) -> tuple[TrainState, Metrics]:
    """The training program of a run, compiled once: `step_program._cache_size()` counts. Donates the old state.

    Plain `jax.jit`, not `eqx.filter_jit`, which waits for every result and so would keep an accelerator idle, and on
    the state as it is: to take it apart and put it together is a third of what the host does for a step.
    """
    with layout.applied() if layout else nullcontext():
        state, metrics = train_step(optimizer, state, images, root, compute, guard, log_every)
    return layout.pinned(state) if layout else state, metrics


def compiled_step(fixed: Fixed, images: Images, state: TrainState) -> tuple[TrainState, Metrics]:
    """`train_step` as one program; the old state's buffers become the new one's.

    A CPU is done with the step before when the next one is sent off: else both may hold their temporary memory at once.
    The host's other work goes on beside a step all the same.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(state)
    return step_program(state, images, **fixed._asdict())
