"""What is evaluated: a run's state or weights that left their run, beside the floors that belong to them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.random as jr

from jepax import checkpoint, sharding
from jepax import config as configs
from jepax.data import open_source
from jepax.evals import report
from jepax.evals.floors import RawPixels
from jepax.evals.frozen import Frozen, FrozenViT, encoder_of
from jepax.evals.report import SPLITS
from jepax.evals.say import SILENT, Say
from jepax.nn import ViT
from jepax.optim import Optimizer
from jepax.settings import Config
from jepax.step import TrainState, build_method, first_state
from jepax.types import UserError
from jepax.views import CropConfig
from jepax.weights import load_encoder, refuse_other_formats

EVALUATION_KEY = 2
"""Folded into the seed's key; 0 and 1 belong to the first parameters and to training."""


@dataclass(frozen=True)
class Subject:
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


def of_run(config: Config, state: TrainState, run: Path, settings: Config | None = None) -> Subject:
    """A run's state. `settings`: the config whose data and protocols are used; None: the run's own.

    Raises `UserError` where the method lacks the encoder that is asked for.
    """
    settings = config if settings is None else settings
    untrained = build_method(config.method, 1, jr.key(config.seed))
    trained, untrained = (encoder_of(method, settings.eval.encoder) for method in (state.method, untrained))
    step = int(state.step)
    choice = settings.eval.encoder
    told = {
        "folder": run.resolve().name,
        "recipe": config.recipe,
        "encoder": next(iter(state.method.encoders())) if choice == "default" else choice,
    }
    name = f"step_{step:08d}{tag(config, settings)}"
    return Subject(trained, untrained, config.method.crop, step, settings, run, name, told)


def of_weights(folder: Path, settings: Config) -> Subject:
    """Exported weights, of this project or of others in the same format; its floor is an encoder of the same sizes."""
    if settings.eval.encoder != "default":
        raise UserError(f"eval.encoder={settings.eval.encoder} is for runs; {folder} holds one encoder")
    encoder, crop = load_encoder(folder)
    untrained = ViT(encoder.config, key=jr.key(settings.seed))
    name = f"weights{tag(Config(), settings) or '-default'}"
    told = {"folder": folder.resolve().name, "recipe": "exported weights", "encoder": "default"}
    return Subject(encoder, untrained, crop, 0, settings, folder, name, told)


def restored(
    config: Config, run: Path, step: int | None = None, *, only: tuple[str, ...] = ("method.", "step")
) -> TrainState:
    """A checkpoint of the run, its newest or that of `step`, to be looked at: its schedules know no length, and the
    optimiser's state is not read, unless `only`, as in `checkpoint.restore`, asks for it.

    Raises `UserError` where it is not there, and where another config wrote it. The run's data is not read.
    """
    saved = checkpoint.steps(run / "checkpoints")
    if not saved:
        raise UserError(
            f"{run} holds no finished checkpoint; train it first: jepax train {run / 'config.yaml'} --run-dir {run}"
        )
    if step is not None and step not in saved:
        raise UserError(f"{run} holds no finished checkpoint of step {step}; there are {', '.join(map(str, saved))}")
    state = eqx.filter_eval_shape(first_state, config.method, Optimizer(config.optim, 1, 0), jr.key(config.seed))
    state = sharding.Layout(sharding.make_mesh()).abstract(state)
    step = saved[-1] if step is None else step
    return checkpoint.restore(run / "checkpoints", step, state, only=only)


def tag(own: Config, settings: Config) -> str:
    """What tells an evaluation by other settings from the run's own: its protocols, and a digest of the difference."""
    if (own.eval, own.data, own.seed) == (settings.eval, settings.data, settings.seed):
        return ""
    decides = [asdict(settings.eval), asdict(settings.data), settings.seed]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
    return f"-{'+'.join(settings.eval.protocols)}-{digest}"


def evaluate(subject: Subject, say: Say = SILENT, floors: Path | None = None) -> tuple[dict[str, Any], Path]:
    """Every protocol on the subject, beside its own untrained self, raw pixels and the majority class.

    Returns the results and the file in evals/ that holds them. `floors`: see `report.evaluate_all`.
    """
    config = subject.config
    sources = {split: open_source(config.data, split) for split in SPLITS}
    check_channels(subject, sources["train"].canvas_shape[2])
    results = report.evaluate_all(
        rows_of(subject),
        sources,
        config.eval,
        step=subject.step,
        key=jr.fold_in(jr.key(config.seed), EVALUATION_KEY),
        reading={"threads": config.data.threads, "workers": config.data.workers},
        say=say,
        floors=floors,
    )
    results |= {"subject": subject.told, "data": configs.to_dict(config.data)}
    return results, report.write(results, subject.folder, subject.name)


def rows_of(subject: Subject) -> dict[str, Frozen]:
    """The rows that are measured."""
    crop, pool = subject.crop, subject.config.eval.pool
    return {
        "trained": FrozenViT(subject.trained, crop, pool),
        "untrained": FrozenViT(subject.untrained, crop, pool),
        "pixels": RawPixels(crop, subject.trained.config.patch_size),
    }


def check_channels(subject: Subject, has: int) -> None:
    """Raises `UserError` where the pictures have another number of channels than the encoder reads."""
    wants = subject.trained.config.channels
    if wants != has:
        raise UserError(
            f"the encoder reads {wants} channels, but the pictures of data.source={subject.config.data.source} have"
            f" {has};\nset --data.channels {wants}"
        )


def config_of(run: Path) -> Config:
    """Of a run's folder. Raises `UserError` naming the nearest one, or what lies there instead."""
    if not (run / "config.yaml").is_file():
        refuse_other_formats(run)
        near = sorted(str(path.parent) for path in run.parent.glob("*/config.yaml"))
        way = configs.nearest(str(run), near) if near else f"no run lies in {run.parent}"
        raise UserError(f"{run} is no run's folder: it holds no config.yaml; {way}")
    return configs.load(Config, run / "config.yaml")
