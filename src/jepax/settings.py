"""Everything that a run depends on, and what must hold before its first step."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jepax import checkpoint, files, sharding
from jepax import config as configs
from jepax.data import DataConfig, Source, open_source
from jepax.distributed import multihost
from jepax.evals.protocols import EvalConfig
from jepax.guard import GuardConfig
from jepax.methods import MethodConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.optim import OptimConfig, Optimizer
from jepax.saving import SaveConfig
from jepax.sharding import ShardingConfig
from jepax.trackers import Tracker
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
    accumulate: int = 1
    """Pieces that a step's batch goes through the networks in, one after the other, where memory is short: the same
    losses and gradients as at once, also of methods that read statistics of the batch, for one more forward pass."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; parameters, teacher, norms and losses stay in float32. auto: bfloat16 but on a CPU."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    save: SaveConfig = field(default_factory=SaveConfig)
    """Checkpoints."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Steps that would harm the run."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """What lies whole on every device, and what is split over all of them."""
    trackers: tuple[Tracker, ...] = ()
    """Views of the log elsewhere, each behind an extra of its name; metrics.jsonl holds everything without them."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "log_every", "accumulate"):
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


FREE = (
    *("data.root", "data.threads", "data.workers", "data.broken_share"),
    *("eval", "train.log_every", "train.save", "train.trackers", "train.sharding", "train.accumulate"),
)
"""Settings that a run may go on with in another value: what is trained does not depend on them."""
CONFIG, DATA = "config.yaml", "data.json"


def under(path: str, names: Sequence[str]) -> bool:
    """Whether one of the names is the setting of this path, or a group that holds it."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def claim(run: Path, config: Config, source: Source | None = None, allow: Sequence[str] = ()) -> None:
    """Refuses a run folder of another config, or of other data than `source`, but for what `FREE` and `allow` name.

    Raises `UserError` with the differences. Writes nothing: `record` does.
    """
    if not (run / CONFIG).exists() and checkpoint.steps(run / "checkpoints"):
        raise UserError(
            f"{run} holds checkpoints, but no {CONFIG} that says of what: bring it back, or take another --run-dir"
        )
    different = differences(run, config, (*FREE, *allow))
    if different:
        names = " ".join(line.split(": ")[0] for line in different[:3])
        raise UserError(
            "\n".join(
                [
                    f"{run} contains a run with a different config (saved -> requested):",
                    *different[:3],
                    f"take another --run-dir, or the folder's own config.yaml, or --allow-config-change {names}",
                ]
            )
        )
    if source is not None and not under("data", allow):
        refuse_other_data(run, source)


def differences(run: Path, config: Config, free: Sequence[str] = ()) -> list[str]:
    """Lines `field.path: there -> here` of the fields, outside those that are free, in which the run's config differs.

    Empty where the folder holds no run.
    """
    path = run / CONFIG
    found = configs.differences(configs.load(Config, path), config) if path.exists() else []
    return [line for line in found if not under(line.split(": ")[0], free)]


def refuse_other_data(run: Path, source: Source) -> None:
    """Raises `UserError` where the pictures are not those that the run began with."""
    if not (run / DATA).exists():
        return
    if changed := _changed(read_contents(run), source.fingerprint):
        raise UserError(
            "\n".join(
                [
                    f"{run} was trained on other pictures, {_parts(changed)} (then -> now):",
                    *changed[:2],
                    "bring the pictures back, take another --run-dir, or --allow-config-change data",
                ]
            )
        )


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name, '(absent)')} -> {now.get(name, '(absent)')}" for name in names]


def _parts(changed: list[str]) -> str:
    return "1 part differs" if len(changed) == 1 else f"{len(changed)} parts differ"


def refuse_unequal_data(source: Source) -> None:
    """Raises `UserError` where the processes of a run do not see the same pictures. All have to call it."""
    mine = json.dumps(source.fingerprint, sort_keys=True)
    if len(set(multihost.all_gather_str(hashlib.sha256(mine.encode()).hexdigest()))) == 1:
        return
    first, *others = map(json.loads, multihost.all_gather_str(mine))
    for process, contents in enumerate(others, 1):
        if changed := _changed(first, contents):
            raise UserError(
                f"process {process} has other pictures than process 0, {_parts(changed)} (0 -> {process}):\n"
                f"{changed[0]}\n"
                "give every host the same files, or all of them a data.root that they share"
            )


def read_contents(run: Path) -> dict[str, str]:
    """What the run's data held when it began. Raises `UserError` where the file cannot be read."""
    try:
        return json.loads((run / DATA).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run / DATA} cannot be read ({error}); remove it to take the data as it is now") from error


def record(run: Path, config: Config, source: Source | None = None) -> list[str]:
    """Writes the config, and the data's contents, into the run folder, and returns what changed in the config."""
    path, changed = run / CONFIG, differences(run, config)
    if changed or not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        configs.dump(config, path)
    if source is not None:
        files.atomic_write(run / DATA, json.dumps(source.fingerprint, indent=1) + "\n")
    return changed


def check(config: Config, source: Source) -> None:
    """Raises `UserError` where method, batch and data do not fit each other, before anything is built."""
    if config.train.batch_size < 2:
        raise UserError(
            "train.batch_size=1 leaves no statistics over the batch, which losses and diagnostics read; try 2"
        )
    if config.train.save.best is not None and config.eval.online.every == 0:
        raise UserError(
            f"train.save.best={config.train.save.best} needs eval.online.every above 0, which measures it; try 500"
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
    sharding.check_batch(config.train.batch_size, config.train.accumulate)
    source = open_source(config.data, "train")
    check(config, source)
    return source, make_optimizer(config, total_steps(config, len(source)), len(source))


def check_splits(data: DataConfig) -> None:
    """Raises `UserError` where evaluation will lack a split: now, and not after the last step."""
    for split in ("validation", "test"):
        open_source(data, split)
