"""The training loop, from a `Config` to a trained and evaluated state: read this first."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from jepax import checkpoint, sharding
from jepax.data import Source, batches
from jepax.evals.watchdog import Watchdog
from jepax.logs import Log
from jepax.methods import AbstractMethod, MethodConfig
from jepax.monitor import Peaks, guarded, log_values, online_of, online_scores, refuse_not_finite, warn
from jepax.optim import Optimizer
from jepax.settings import Config, claim, compute_dtype, prepare
from jepax.trees import cast, norm, norms_by_layer, trainable
from jepax.types import Images, Metrics


class TrainState(eqx.Module):
    """All that a step changes, and all that a checkpoint holds."""

    method: AbstractMethod
    opt_state: optax.OptState
    step: Int[Array, ""]


def init_state(method: AbstractMethod, optimizer: Optimizer) -> TrainState:
    """The state before step 0. Only trainable parameters get optimiser state."""
    params = eqx.filter(method, trainable(method))
    return TrainState(method=method, opt_state=optimizer.init(params), step=jnp.int32(0))


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


def train_step(
    optimizer: Optimizer, state: TrainState, images: Images, root: PRNGKeyArray, compute: DTypeLike = jnp.float32
) -> tuple[TrainState, Metrics]:
    """One update: loss and gradients over the global batch, AdamW, then what gradients do not change.

    Everything random comes from `fold_in(root, step)`, and an example's own part from its index in the run's order:
    the same on any number of workers, devices or hosts.
    """
    params, rest = eqx.partition(state.method, trainable(state.method))

    def loss_of(params: AbstractMethod) -> tuple[Array, Metrics]:
        method = cast(eqx.combine(params, rest), compute)
        return method.loss(images, key=jr.fold_in(root, state.step))

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, state.opt_state, params, state.step)
    method = eqx.combine(eqx.apply_updates(params, updates), rest)
    method, moved = method.after_update(state.step)
    metrics |= moved | {
        "loss": loss,
        "learning_rate": optimizer.learning_rate(state.step),
        "weight_decay": optimizer.weight_decay(state.step),
        "grad_norm": norm(grads),
        "grad_norm_encoder_by_block": norms_by_layer(grads.encoder.stack.blocks),
        **predictor_norms(getattr(grads, "predictor", None)),
        "update_norm": norm(updates),
    }
    return TrainState(method=method, opt_state=opt_state, step=state.step + 1), metrics


@partial(jax.jit, static_argnames=("optimizer", "rest", "compute"), donate_argnames=("arrays",))
def step_program(
    arrays: PyTree, images: Images, root: PRNGKeyArray, *, optimizer: Optimizer, rest: PyTree, compute: DTypeLike
) -> tuple[PyTree, Metrics]:
    """The training program of a run, compiled once: `step_program._cache_size()` counts. Donates the old state.

    Plain `jax.jit`, not `eqx.filter_jit`, which waits for every result and so would keep an accelerator idle.
    """
    state, metrics = train_step(optimizer, eqx.combine(arrays, rest), images, root, compute)
    return eqx.filter(state, eqx.is_array), metrics


def compiled_step(
    inputs: tuple[Optimizer, Images, PRNGKeyArray, DTypeLike], state: TrainState
) -> tuple[TrainState, Metrics]:
    """`train_step` as one program; the old state's buffers become the new one's."""
    optimizer, images, root, compute = inputs
    arrays, rest = eqx.partition(state, eqx.is_array)
    arrays, metrics = step_program(arrays, images, root, optimizer=optimizer, rest=rest, compute=compute)
    return eqx.combine(arrays, rest), metrics


def train(config: Config, run: Path) -> TrainState:
    """Trains in the folder `run`, or continues there: restore -> for batch: step -> log -> save.

    Raises `UserError` where the folder holds a run of another config, and where loss or update stop being finite.
    """
    source, optimizer = prepare(config)
    mesh, compute, steps = sharding.make_mesh(), compute_dtype(config), optimizer.total_steps
    root = sharding.replicate(jr.fold_in(jr.key(config.seed), 1), mesh)
    state = sharding.replicate(first_state(config.method, optimizer, jr.key(config.seed)), mesh)
    claim(run, config)

    saved = checkpoint.whole_steps(run / "checkpoints")
    state = checkpoint.restore(run / "checkpoints", saved[-1], state) if saved else state
    start, every = int(state.step), config.train
    with Log(run / "metrics.jsonl", steps=steps, start=start) as log:
        log.begin(run, every.batch_size)
        dog, peaks, previous = Watchdog(log.kept), Peaks(), None
        online = online_of(config, source, steps)
        evaluations = start // config.eval.online.every if online is not None else 0
        with guarded(run, dog, peaks):
            for step, images in enumerate(read(config, source, steps, start), start):
                state, metrics = compiled_step((optimizer, sharding.shard_batch(images, mesh), root, compute), state)
                if previous is not None:  # the step before: the device never waits for this check
                    refuse_not_finite(*previous)
                    peaks.add(previous[1])
                previous = step, metrics
                if step == start:
                    log.compiled(metrics["loss"])
                last, save = step + 1 == steps, (step + 1) % every.save_every == 0
                if step == 0 or (step + 1) % every.log_every == 0 or save or last:
                    refuse_not_finite(*previous)
                    peaks.add(metrics)
                    previous = None
                    values = log_values(metrics, log.seconds_per_step(step), every.batch_size) | peaks.take()
                    if online is not None and (step + 1) // config.eval.online.every > evaluations:
                        evaluations = (step + 1) // config.eval.online.every
                        with log.aside():
                            values |= online_scores(online, config, step, state.method)
                    warn(log, run, dog, log.write(step, values))
                if save or last:  # after its line, so that a run which goes on from here lacks none
                    checkpoint.save(run / "checkpoints", step + 1, state, keep=every.keep)
                log.advance(step)
    return state


def read(config: Config, source: Source, steps: int, start: int) -> Iterator[Images]:
    """This host's slices of the batches of steps `start` to `steps` - 1."""
    return batches(
        source,
        batch_size=config.train.batch_size,
        steps=steps,
        start=start,
        seed=config.seed,
        threads=config.data.threads,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
