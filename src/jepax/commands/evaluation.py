"""What is evaluated: a run's state or weights that left their run, beside the floors that belong to them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.random as jr

from jepax.data import open_source
from jepax.distributed import sharding
from jepax.evals import report
from jepax.evals.baselines import PixelFeatures
from jepax.evals.feature_extractor import FeatureExtractor, ViTFeatures, select_encoder
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.evals.report import SPLIT_NAMES
from jepax.export.weights import check_format, load_encoder
from jepax.io import checkpoint
from jepax.io import config_yaml as configs
from jepax.nn import ViT
from jepax.optim import Optimizer
from jepax.training.config import Config
from jepax.training.setup import abstract_state, init_method
from jepax.training.step import TrainState
from jepax.types import UserError
from jepax.views import CropConfig

EVALUATION_KEY = 2
"""Folded into the seed's key; 0 and 1 belong to the first parameters and to training."""


@dataclass(frozen=True)
class EvalTarget:
    """What is evaluated, by a config's `eval` on its `data`."""

    trained: ViT
    untrained: ViT
    crop: CropConfig
    step: int
    """0 for weights that left their run."""
    config: Config
    folder: Path
    """Where evals/ is written."""
    name: str
    """Of the file, without its suffix."""
    told: dict[str, str]
    """What it is, for the results: its folder, recipe and encoder."""


def target_from_run(config: Config, state: TrainState, run: Path, settings: Config | None = None) -> EvalTarget:
    """A run's state. `settings`: the config whose data and protocols are used; None: the run's own.

    Raises `UserError` where the method lacks the encoder that is asked for.
    """
    settings = config if settings is None else settings
    untrained = init_method(config.method, 1, jr.key(config.seed))
    trained, untrained = (select_encoder(method, settings.eval.encoder) for method in (state.method, untrained))
    step = int(state.step)
    choice = settings.eval.encoder
    told = {
        "folder": run.resolve().name,
        "recipe": config.recipe,
        "encoder": next(iter(state.method.encoders())) if choice == "default" else choice,
    }
    name = f"step_{step:08d}{eval_tag(config, settings)}"
    return EvalTarget(trained, untrained, config.method.crop, step, settings, run, name, told)


def target_from_weights(folder: Path, settings: Config) -> EvalTarget:
    """Exported weights, of this project or of others in the same format; its floor is an encoder of the same sizes."""
    if settings.eval.encoder != "default":
        raise UserError(f"eval.encoder={settings.eval.encoder} is for runs; {folder} holds one encoder")
    encoder, crop = load_encoder(folder)
    untrained = ViT(encoder.config, key=jr.key(settings.seed))
    name = f"weights{eval_tag(Config(), settings) or '-default'}"
    told = {"folder": folder.resolve().name, "recipe": "exported weights", "encoder": "default"}
    return EvalTarget(encoder, untrained, crop, 0, settings, folder, name, told)


def load_state(
    config: Config, run: Path, step: int | None = None, *, only: tuple[str, ...] = ("method.", "step")
) -> TrainState:
    """A checkpoint of the run, its newest or that of `step`, to be looked at: its schedules know no length, and the
    optimiser's state is not read, unless `only`, as in `checkpoint.restore`, asks for it.

    Raises `UserError` where it is not there, and where another config wrote it. The run's data is not read.
    """
    saved = checkpoint.list_steps(run / "checkpoints")
    if not saved:
        raise UserError(
            f"{run} holds no finished checkpoint; train it first: jepax train {run / 'config.yaml'} --run-dir {run}"
        )
    if step is not None and step not in saved:
        raise UserError(f"{run} holds no finished checkpoint of step {step}; there are {', '.join(map(str, saved))}")
    state = abstract_state(config.method, Optimizer(config.optim, 1, 0))
    state = sharding.ShardingPlan(sharding.make_mesh()).abstract(state)
    step = saved[-1] if step is None else step
    return checkpoint.restore(run / "checkpoints", step, state, only=only)


def eval_tag(own: Config, settings: Config) -> str:
    """What tells an evaluation by other settings from the run's own: its protocols, and a digest of the difference."""
    if (own.eval, own.data, own.seed) == (settings.eval, settings.data, settings.seed):
        return ""
    decides = [asdict(settings.eval), asdict(settings.data), settings.seed]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
    return f"-{'+'.join(settings.eval.protocols)}-{digest}"


def evaluate(
    subject: EvalTarget, say: ProgressReporter = SILENT_PROGRESS, floors: Path | None = None
) -> tuple[dict[str, Any], Path]:
    """Every protocol on the subject, beside its own untrained self, raw pixels and the majority class.

    Returns the results and the file in evals/ that holds them. `floors`: see `report.evaluate_all`.
    """
    config = subject.config
    sources = {split: open_source(config.data, split) for split in SPLIT_NAMES}
    check_channels(subject, sources["train"].canvas_shape[2])
    results = report.evaluate_rows(
        make_rows(subject),
        sources,
        config.eval,
        step=subject.step,
        key=jr.fold_in(jr.key(config.seed), EVALUATION_KEY),
        reading={"threads": config.data.threads, "workers": config.data.workers},
        say=say,
        floors=floors,
    )
    results |= {"subject": subject.told, "data": configs.to_dict(config.data)}
    return results, report.write_report(results, subject.folder, subject.name)


def make_rows(subject: EvalTarget) -> dict[str, FeatureExtractor]:
    """The rows that are measured."""
    crop, pool = subject.crop, subject.config.eval.pool
    return {
        "trained": ViTFeatures(subject.trained, crop, pool),
        "untrained": ViTFeatures(subject.untrained, crop, pool),
        "pixels": PixelFeatures(crop, subject.trained.config.patch_size),
    }


def check_channels(subject: EvalTarget, has: int) -> None:
    """Raises `UserError` where the pictures have another number of channels than the encoder reads."""
    wants = subject.trained.config.channels
    if wants != has:
        raise UserError(
            f"the encoder reads {wants} channels, but the pictures of data.source={subject.config.data.source} have"
            f" {has};\nset --data.channels {wants}"
        )


def load_run_config(run: Path) -> Config:
    """Of a run's folder. Raises `UserError` naming the nearest one, or what lies there instead."""
    if not (run / "config.yaml").is_file():
        check_format(run)
        near = sorted(str(path.parent) for path in run.parent.glob("*/config.yaml"))
        way = configs.suggest(str(run), near) if near else f"no run lies in {run.parent}"
        raise UserError(f"{run} is no run's folder: it holds no config.yaml; {way}")
    return configs.load(Config, run / "config.yaml")
