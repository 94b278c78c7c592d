"""Takes a step again that ended a run, and says where it stops being finite."""

import math
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax import checkpoint, dump, sharding
from jepax import config as configs
from jepax.optim import Optimizer
from jepax.settings import Config, compute_dtype
from jepax.step import Fixed, TrainState, compiled_step, first_state, layout_of, loss_and_gradients
from jepax.types import Images, Metrics

SHOWN = 8
"""Names of arrays that are listed."""


def replay(folder: Path, say: Callable[[str], None] = print) -> Metrics:
    """Restores state, batch and config of the dump, takes the step as it was taken, and returns its metrics.

    Raises `UserError` where the folder is no dump, or a file of it is damaged.
    """
    facts = dump.read_facts(folder)
    config = configs.load(Config, folder / dump.CONFIG)
    images = dump.read_images(folder)
    optimizer = Optimizer(config.optim, facts.total_steps, facts.warmup_steps)
    mesh = sharding.make_mesh(math.gcd(len(images.index), jax.device_count()))
    layout = layout_of(config.train.sharding, config.train.accumulate, config.method, optimizer, mesh)
    state = eqx.filter_eval_shape(first_state, config.method, optimizer, jr.key(config.seed))
    state = checkpoint.restore(folder / dump.STATE, facts.step, layout.abstract(state))
    root, batch = sharding.replicate(jr.fold_in(jr.key(config.seed), 1), mesh), sharding.shard_batch(images, mesh)
    say(f"step {facts.step} of {facts.total_steps}, {len(images.index)} examples, positions {positions(images)}")
    say_not_finite("state before it", state, say)
    with layout.applied():
        say_gradients(config, state, batch, root, say)
    fixed = Fixed(optimizer, root, compute_dtype(config), config.train.guard, layout, config.train.log_every)
    _, metrics = compiled_step(fixed, batch, state)  # takes the state's memory, so it comes last
    for name in ("loss", "grad_norm"):
        say(f"{name}: {float(metrics[name])} now, {facts.seen[name]} when the run took it")
    if same(metrics, facts):
        say("the same, to the last digit")
    elif facts.where != (here := dump.where(mesh.size)):
        say(f"the run had {facts.where}; here is {here}")
    return metrics


def same(metrics: Metrics, facts: dump.Facts) -> bool:
    """Whether loss and gradient norm are what the run saw, not-a-number equal to itself."""
    now = [float(metrics[name]) for name in ("loss", "grad_norm")]
    return np.array_equal(now, [float(facts.seen[name]) for name in ("loss", "grad_norm")], equal_nan=True)


def positions(images: Images) -> str:
    """Of the examples in the run's order."""
    return f"{int(np.min(images.index))} to {int(np.max(images.index))}"


def say_not_finite(what: str, tree: object, say: Callable[[str], None]) -> None:
    """The names of the arrays that hold values which are not finite; the guard's own memory of norms may."""
    arrays = checkpoint.named(tree)
    bad = [name for name, x in arrays.items() if eqx.is_inexact_array(x) and name != "guard.norms"]
    bad = [name for name in bad if not bool(jnp.isfinite(arrays[name]).all())]
    listed = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
    say(f"{what}: {f'not finite in {listed}' if bad else 'all finite'}")


def say_gradients(
    config: Config, state: TrainState, images: Images, root: jax.Array, say: Callable[[str], None]
) -> None:
    """Which parameters' gradients, and which terms of the loss, are not finite."""
    compute = compute_dtype(config)

    @eqx.filter_jit
    def gradients(state: TrainState, images: Images, root: jax.Array) -> tuple[Metrics, object]:
        loss, metrics, grads = loss_and_gradients(state.method, images, jr.fold_in(root, state.step), compute)
        return metrics | {"loss": loss}, grads

    metrics, grads = gradients(state, images, root)
    say_not_finite("terms and embeddings of the loss", metrics, say)
    say_not_finite("gradients", grads, say)
