"""Config of a run, and its checks before the first step."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jepax.data import CLIP_DATASETS, DataConfig, ImageSource, Source, open_source
from jepax.distributed import multihost
from jepax.distributed.sharding import ShardingConfig
from jepax.evals.protocols import EvalConfig
from jepax.io import atomic, checkpoint
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig
from jepax.io.trackers import TrackerName
from jepax.methods import ImageMethodConfig, MethodConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.optim import OptimConfig, Optimizer
from jepax.training.grad_guard import GradGuardConfig
from jepax.types import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision, checkpoints and logs."""

    batch_size: int = 2048
    """Examples per step, images or clips, over all devices and hosts."""
    epochs: float = 300.0
    """Passes over the training split; may be fractional."""
    steps: int | None = None
    """Steps of the run; None computes them from the epochs."""
    grad_accum_steps: int = 1
    """Micro-batches per step, processed sequentially to save memory. Losses and gradients are those of the full batch,
    also for methods with batch statistics, at the cost of one more forward pass."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; parameters, teacher, norms and losses are float32. auto: bfloat16, float32 on a CPU."""
    log_every_steps: int = 50
    """Steps between records of metrics.jsonl."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    grad_guard: GradGuardConfig = field(default_factory=GradGuardConfig)
    """Guard against non-finite and spiking gradients."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """Parameters, optimizer state and teacher: replicated on every device or sharded over all."""
    loggers: tuple[TrackerName, ...] = ()
    """External loggers, each an optional extra of its name; metrics.jsonl is complete without them."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "log_every_steps", "grad_accum_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name}={getattr(self, name)} must be above 0")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"train.steps={self.steps} must be at least 1, or None to take them from train.epochs")


@dataclass(frozen=True)
class Config:
    """All settings of a run. Recipes are functions that return one."""

    recipe: str = "custom"
    """Name of the recipe that this config started from."""
    seed: int = 0
    """Seed of the initial parameters, the order of examples, and every random choice of a step."""
    method: MethodConfig = field(default_factory=IJEPAConfig)
    """Method, its networks, masks and views."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dataset and loading."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and its schedules."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, precision."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation protocols."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be from 0 to 2^32 - 1: jax takes 32 bits of it")


def compute_total_steps(config: Config, examples: int) -> int:
    """Steps of a run over `examples` training examples."""
    if config.train.steps is not None:
        return config.train.steps
    return max(round(config.train.epochs * examples / config.train.batch_size), 1)


def make_optimizer(config: Config, examples: int) -> Optimizer:
    """Optimizer of the run, with warm-up in steps. Raises `UserError` if the warm-up fills the schedule."""
    steps = compute_total_steps(config, examples)
    warmup = round(config.optim.warmup_epochs * examples / config.train.batch_size)
    if warmup >= steps * config.optim.schedule_stretch:
        raise UserError(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is {warmup} steps, but the run has {steps};"
            " shorten the warm-up or lengthen the run"
        )
    return Optimizer(config.optim, steps, warmup)


def resolve_compute_dtype(config: Config) -> DTypeLike:
    """Type of matrix products, on this machine's devices. bfloat16 was slower than float32 on every CPU measured."""
    if config.train.compute_dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.train.compute_dtype)


# The stars only keep these names on two lines.
RESUMABLE_FIELDS = (
    *("data.root", "data.num_threads", "data.num_workers", "data.max_corrupt_fraction"),
    *("eval", "train.log_every_steps", "train.checkpoint", "train.loggers", "train.sharding", "train.grad_accum_steps"),
)
"""Fields that may change when a run resumes: training does not depend on them."""
CONFIG_FILE, DATA_FILE = "config.yaml", "data.json"


def matches_prefix(path: str, names: Sequence[str]) -> bool:
    """True if one of the names is this field or a group that contains it."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def check_run_dir(run: Path, config: Config, source: Source | None = None, allow: Sequence[str] = ()) -> None:
    """Raise `UserError` if the run folder has another config or other data than `source`; the error lists them.

    Fields in `RESUMABLE_FIELDS` and `allow` may differ. Writes nothing: `write_run_config` does.
    """
    trained = bool(checkpoint.list_steps(run / "checkpoints"))
    if trained and not (run / CONFIG_FILE).exists():
        raise UserError(f"{run} has checkpoints, but no {CONFIG_FILE}: restore it, or choose another --run-dir")
    batch_size = [line for line in diff_from_run(run, config) if line.startswith("train.batch_size: ")]
    if trained and batch_size:
        raise UserError(
            f"{batch_size[0]}: {run} has steps of the first size, and its schedules and order of data count steps;\n"
            "resume with that size (train.grad_accum_steps saves memory), or choose another --run-dir"
        )
    if different := diff_from_run(run, config, (*RESUMABLE_FIELDS, *allow))[:3]:
        names = " ".join(line.split(": ")[0] for line in different)
        raise UserError(
            "\n".join((f"{run} contains a run with a different config (saved -> requested):", *different))
            + f"\nchoose another --run-dir, or the folder's own config.yaml, or --allow-config-change {names}"
        )
    # Without a checkpoint nothing is trained yet, so other data do no harm.
    if trained and source is not None and not matches_prefix("data", allow):
        check_same_data(run, source)


def diff_from_run(run: Path, config: Config, free: Sequence[str] = ()) -> list[str]:
    """Differences from the run's config, except `free` fields, each as `field.path: saved -> requested`.

    Empty if the folder has no run.
    """
    path = run / CONFIG_FILE
    found = configs.diff(configs.load(Config, path), config) if path.exists() else []
    return [line for line in found if not matches_prefix(line.split(": ")[0], free)]


def check_same_data(run: Path, source: Source) -> None:
    """Raise `UserError` if the data is not what the run started with."""
    path = run / DATA_FILE
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to accept the data as it is now") from error
    if changed := configs.diff(saved, source.fingerprint):
        raise UserError(
            "\n".join((f"{run} was trained on other data, {_count_parts(changed)} (then -> now):", *changed[:2]))
            + "\nrestore the data, choose another --run-dir, or --allow-config-change data"
        )


def write_run_config(run: Path, config: Config, source: Source | None = None) -> list[str]:
    """Write config and data fingerprint to the run folder; returns the differences from the saved config."""
    path, changed = run / CONFIG_FILE, diff_from_run(run, config)
    if changed or not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        configs.save(config, path)
    if source is not None:
        atomic.atomic_write(run / DATA_FILE, json.dumps(source.fingerprint, indent=1) + "\n")
    return changed


def validate(config: Config, source: Source) -> None:
    """Raise `UserError` if method, batch and data do not fit each other, before anything is built."""
    if config.train.batch_size < 2:
        raise UserError("train.batch_size=1 has no batch statistics, which losses and diagnostics need; try 2")
    best_metric = config.train.checkpoint.best_metric
    if best_metric is not None and not can_evaluate_online(config, source):
        raise UserError(
            f"train.checkpoint.best_metric={best_metric} needs eval.online.every_steps above 0, which measures it;"
            " try 500 (on labeled images: nothing else is evaluated)"
        )
    config.method.check_data(source)


def can_evaluate_online(config: Config, source: Source) -> bool:
    """True if the encoder is evaluated during training: it is enabled, and the run's images are of several classes."""
    if not (isinstance(config.method, ImageMethodConfig) and isinstance(source, ImageSource)):
        return False
    return config.eval.online.every_steps > 0 and source.classes > 1


def check_eval_splits(data: DataConfig) -> None:
    """Raise `UserError` now, not after the last step, if probes lack a split. Clips have none: `plan` opens its own."""
    for split in () if data.dataset in CLIP_DATASETS else ("validation", "test"):
        open_source(data, split)


def check_same_config_on_hosts(config: Config) -> None:
    """Raise `UserError` if the processes of a run have different configs. Every process must call it."""
    if found := _diff_hosts(configs.flatten(config)):
        process, changed = found
        raise UserError(f"process {process} has a different config than process 0 (0 -> {process}): {changed[0]}")


def check_same_data_on_hosts(source: Source) -> None:
    """Raise `UserError` if the processes of a run have different data. Every process must call it."""
    if found := _diff_hosts(source.fingerprint):
        process, changed = found
        raise UserError(
            f"process {process} has other data than process 0, {_count_parts(changed)} (0 -> {process}):\n"
            f"{changed[0]}\n"
            "give every host the same files, or all of them a data.root that they share"
        )


def _diff_hosts(values: dict[str, Any]) -> tuple[int, list[str]] | None:
    """The first process whose values are not those of process 0, and the differences; None if all are equal."""
    text = json.dumps(values, sort_keys=True)
    if len(set(multihost.all_gather_str(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return None
    first, *others = map(json.loads, multihost.all_gather_str(text))
    return next((p, changed) for p, other in enumerate(others, 1) if (changed := configs.diff(first, other)))


def _count_parts(changed: list[str]) -> str:
    return "1 part differs" if len(changed) == 1 else f"{len(changed)} parts differ"
