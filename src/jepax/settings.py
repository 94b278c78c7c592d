"""Everything that a run depends on, and what must hold before its first step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jepax import config as configs
from jepax import sharding
from jepax.data import DataConfig, Source, open_source
from jepax.evals.protocols import EvalConfig
from jepax.methods import MethodConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.optim import OptimConfig, Optimizer
from jepax.types import UserError


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
