"""The training loop, from a `Config` to a trained and evaluated state: read this first."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from jepax import checkpoint, sharding
from jepax import config as configs
from jepax.data import DataConfig, Source, batches, open_source
from jepax.evals import alarms
from jepax.evals.frozen import FrozenViT, encoder_of
from jepax.evals.health import diagnose
from jepax.evals.online import Online
from jepax.evals.protocols import EvalConfig
from jepax.evals.watchdog import Watchdog
from jepax.logs import Log, Values, plain
from jepax.methods import AbstractMethod, MethodConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.optim import OptimConfig, Optimizer
from jepax.trees import cast, norm, norms_by_layer, trainable
from jepax.types import Images, Metrics, UserError

ROWS = {"embeddings": "embedding", "projections": "projection"}
"""Metrics with one row per image, diagnosed on the host at logged steps, and what their diagnostics begin with."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches and precision, and what is written on the way."""

    batch_size: int = 2048
    """Images per step, over all devices and hosts."""
    epochs: float = 300.0
    """Passes over the training split; parts of a pass are allowed."""
    steps: int | None = None
    """Steps of the run; None takes them from the epochs."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; parameters, teacher, norms and losses stay in float32. auto: bfloat16 but on a CPU."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    save_every: int = 2000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "log_every", "save_every", "keep"):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name}={getattr(self, name)} must be above 0")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"train.steps={self.steps} must be at least 1, or None to take them from train.epochs")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. Recipes are functions that return one."""

    recipe: str = "custom"
    """Name of the recipe that this config began as."""
    seed: int = 0
    """Seed of the initial parameters, the order of examples, and every random choice of a step."""
    method: MethodConfig = field(default_factory=IJEPAConfig)
    """Method, its networks, masks and views."""
    data: DataConfig = field(default_factory=DataConfig)
    """Pictures."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and its schedules."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, precision."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Probes."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")


class TrainState(eqx.Module):
    """All that a step changes, and all that a checkpoint holds."""

    method: AbstractMethod
    opt_state: optax.OptState
    step: Int[Array, ""]


def total_steps(config: Config, examples: int) -> int:
    """Steps of a run over `examples` training pictures."""
    if config.train.steps is not None:
        return config.train.steps
    return max(round(config.train.epochs * examples / config.train.batch_size), 1)


def make_optimizer(config: Config, steps: int, examples: int) -> Optimizer:
    """The optimiser, its warm-up turned from epochs into steps."""
    warmup = round(config.optim.warmup_epochs * examples / config.train.batch_size)
    if warmup >= steps * config.optim.horizon:
        raise UserError(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is {warmup} steps, but the run has {steps};"
            " shorten the warm-up or lengthen the run"
        )
    return Optimizer(config.optim, steps, warmup)


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


def predictor_norms(grads: PyTree) -> Metrics:
    """Gradient norms of a predictor, where there is one, and of its blocks, where it is made of blocks."""
    if grads is None:
        return {}
    blocks = {"grad_norm_predictor_by_block": norms_by_layer(grads.stack.blocks)} if hasattr(grads, "stack") else {}
    return {"grad_norm_predictor": norm(grads)} | blocks


def local_rows(array: Array) -> np.ndarray:
    """This host's share of an array over the batch."""
    return np.concatenate([shard.data for shard in array.addressable_shards if shard.replica_id == 0])


def compute_dtype(config: Config) -> DTypeLike:
    """Type of matrix products. bfloat16 is slower than float32 on the CPUs that were measured."""
    if config.train.precision == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.train.precision)


def claim(run: Path, config: Config) -> None:
    """Writes `config.yaml` into a new run folder; in an old one, refuses a config that differs from its own."""
    path = run / "config.yaml"
    if path.exists():
        different = configs.differences(configs.load(Config, path), config)
        if different:
            raise UserError(
                "\n".join(
                    [
                        f"{run} holds a run of another config (there -> here):",
                        *different[:3],
                        "take another --run-dir, or the folder's own config.yaml",
                    ]
                )
            )
    else:
        run.mkdir(parents=True, exist_ok=True)
        configs.dump(config, path)


def check(config: Config, source: Source) -> None:
    """Raises `UserError` where method, batch and data do not fit each other, before anything is built."""
    if config.train.batch_size < 2:
        raise UserError(
            "train.batch_size=1 leaves no statistics over the batch, which losses and diagnostics read; try 2"
        )
    method, has = config.method, source.canvas_shape[2]
    mean = "views.global_crop.mean" if hasattr(method, "views") else "crop.mean"
    for name, channels in (("encoder.channels", method.encoder.channels), (mean, len(method.crop.mean))):
        if channels != has:
            raise UserError(
                f"method.{name} is for {channels} channels, but the pictures of"
                f" data.source={config.data.source} have {has};\n"
                f"set method.{name} for {has}, or data.channels={channels}"
            )


def prepare(config: Config) -> tuple[Source, Optimizer]:
    """The training split, and the optimiser of the whole run. Raises `UserError` for what cannot be trained."""
    sharding.check_batch(config.train.batch_size)
    source = open_source(config.data, "train")
    check(config, source)
    return source, make_optimizer(config, total_steps(config, len(source)), len(source))


def check_splits(data: DataConfig) -> None:
    """Raises `UserError` where evaluation will lack a split: now, and not after the last step."""
    for split in ("validation", "test"):
        open_source(data, split)


class Diverged(UserError):
    """The loss, or the update, of a step is not finite any more."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


def refuse_not_finite(step: int, metrics: Metrics) -> None:
    """Raises `Diverged` naming the step. The state after it is lost, so nothing of it is saved."""
    for name, what in (("loss", "loss"), ("update_norm", "update's norm")):
        if not np.isfinite(metrics[name]):
            raise Diverged(
                step,
                f"the {what} of step {step} is {float(metrics[name])}: training stopped, nothing was saved after it;\n"
                "try a lower optim.peak_lr, a longer optim.warmup_epochs, or optim.clip=1.0",
            )


class Peaks:
    """The largest loss and gradient norm of any step since the last line of the log, so that no step is overlooked."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        for name in ("loss", "grad_norm"):
            value = float(metrics[name])
            self.largest[f"{name}_max"] = max(value, self.largest.get(f"{name}_max", value))

    def take(self) -> Values:
        """What was seen; from here on anew."""
        seen, self.largest = self.largest, {}
        return seen


@contextmanager
def guarded(run: Path, dog: Watchdog, peaks: Peaks) -> Iterator[None]:
    """Within, `run`/health.json holds what the watchdog has said; if training diverges, that and its prelude too."""
    alarms.write(run, dog.alarms)
    try:
        yield
    except Diverged as error:
        dog.see({"step": error.step, **peaks.take()})
        alarms.write(run, dog.alarms, ended=str(error).splitlines()[0])
        raise


def warn(log: Log, run: Path, dog: Watchdog, line: dict) -> None:
    """Lets the watchdog see a line; what it says goes to the terminal and into `run`/health.json."""
    new = dog.see(line)
    for alarm in new:
        log.say(f"warning: {alarm}; try {alarm.advice}")
    if new:
        alarms.write(run, dog.alarms)


def log_values(metrics: Metrics, seconds_per_step: float, batch_size: int) -> Values:
    """A step's metrics as they are logged."""
    values = {name: plain(value) for name, value in metrics.items() if name not in ROWS}
    for name, prefix in ROWS.items():
        if name in metrics:
            values |= diagnose(local_rows(metrics[name]), prefix)
    return values | {"seconds_per_step": seconds_per_step, "images_per_second": batch_size / seconds_per_step}


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
        dog, peaks, previous, online = Watchdog(log.kept), Peaks(), None, online_of(config, source, steps)
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
                due = online is not None and (step + 1) % config.eval.online.every == 0
                if step == 0 or (step + 1) % every.log_every == 0 or save or last or due:
                    refuse_not_finite(*previous)
                    peaks.add(metrics)
                    previous = None
                    values = log_values(metrics, log.seconds_per_step(step), every.batch_size) | peaks.take()
                    values |= online(evaluated(config, state.method)) if due else {}
                    warn(log, run, dog, log.write(step, values))
                if save or last:  # after its line, so that a run which goes on from here lacks none
                    checkpoint.save(run / "checkpoints", step + 1, state, keep=every.keep)
                log.advance(step)
    return state


def online_of(config: Config, train: Source, steps: int) -> Online | None:
    """What evaluates during training, if it ever does. The test split is not opened."""
    if not 0 < config.eval.online.every <= steps:
        return None
    return Online(config.eval.online, train, open_source(config.data, "validation"), config.eval.batch_size)


def evaluated(config: Config, method: AbstractMethod) -> FrozenViT:
    """The encoder that the run's evaluations read."""
    return FrozenViT(encoder_of(method, config.eval.encoder), config.method.crop, config.eval.pool)


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
