"""Evaluates a run's checkpoint, or exported weights, with their baselines."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr

from jepax.data import CLIP_DATASETS, open_source
from jepax.distributed import sharding
from jepax.evals import report
from jepax.evals.feature_extractor import FeatureExtractor, PixelFeatures, ViTFeatures, select_encoder
from jepax.evals.progress import SILENT, Progress
from jepax.evals.report import SPLIT_NAMES
from jepax.export.weights import check_format, load_encoder
from jepax.io import checkpoint
from jepax.io import config_yaml as configs
from jepax.methods import ImageMethodConfig
from jepax.nn import ViT
from jepax.optim import Optimizer
from jepax.training.config import Config
from jepax.training.setup import abstract_state, init_method
from jepax.training.step import TrainState
from jepax.types import UserError
from jepax.views import CropConfig

EVALUATION_KEY = 2
"""Folded into the seed's key; 0 and 1 are used for the initial parameters and for training."""


@dataclass(frozen=True)
class EvalTarget:
    """An encoder with its untrained counterpart, and the config whose `eval` and `data` it is evaluated with."""

    trained: ViT
    untrained: ViT
    crop: CropConfig
    step: int
    """0 for exported weights."""
    config: Config
    folder: Path
    """evals/ is written here."""
    name: str
    """File name without its suffix."""
    metadata: dict[str, str]
    """Folder, recipe and encoder, for the results."""


def target_from_run(config: Config, state: TrainState, run: Path, settings: Config | None = None) -> EvalTarget:
    """Target for a run's state. `settings`: the config whose data and protocols are used; None: the run's own.

    Raises `UserError` if the method lacks the requested encoder.
    """
    check_image_method(config)
    settings = config if settings is None else settings
    untrained = init_method(config.method, 1, jr.key(config.seed))
    choice = settings.eval.encoder
    trained, untrained = (select_encoder(method, choice) for method in (state.method, untrained))
    metadata = {
        "folder": run.resolve().name,
        "recipe": config.recipe,
        "encoder": next(iter(state.method.encoders())) if choice == "default" else choice,
    }
    step = int(state.step)
    name = f"step_{step:08d}{eval_tag(config, settings)}"
    # On the devices of the trained one, so that the same programs serve both.
    untrained = jax.device_put(untrained, jax.tree.map(lambda x: x.sharding, trained))
    return EvalTarget(trained, untrained, config.method.crop, step, settings, run, name, metadata)


def check_image_method(config: Config) -> None:
    """Raises `UserError` if the method is not one on images: only these have an encoder to probe and to export."""
    if not isinstance(config.method, ImageMethodConfig):
        raise UserError(
            f"method {config.method.name} has no encoder of images for probes or exports;"
            " a world model is evaluated by --protocols plan"
        )


def target_from_weights(folder: Path, settings: Config) -> EvalTarget:
    """Target for exported weights in jepax's format; the baseline is an untrained encoder of the same size."""
    if settings.eval.encoder != "default":
        raise UserError(f"eval.encoder={settings.eval.encoder} is for runs; {folder} contains one encoder")
    encoder, crop = load_encoder(folder)
    untrained = eqx.filter_jit(ViT)(encoder.config, key=jr.key(settings.seed))
    name = f"weights{eval_tag(Config(), settings) or '-default'}"
    metadata = {"folder": folder.resolve().name, "recipe": "exported weights", "encoder": "default"}
    return EvalTarget(encoder, untrained, crop, 0, settings, folder, name, metadata)


def load_state(
    config: Config, run: Path, step: int | None = None, *, only: tuple[str, ...] = ("method.", "step")
) -> TrainState:
    """Loads a checkpoint of the run, its newest or that of `step`, for inspection and not for further training.

    Its schedules have no length, and the optimizer's state is only read if `only`, as in `checkpoint.restore`, selects
    it. The run's data is not read. Raises `UserError` if the checkpoint does not exist or has another config.
    """
    saved = checkpoint.list_steps(run / "checkpoints")
    if not saved:
        raise UserError(
            f"{run} has no finished checkpoint; train it first: jepax train {run / 'config.yaml'} --run-dir {run}"
        )
    if step is not None and step not in saved:
        raise UserError(f"{run} has no finished checkpoint of step {step}; available: {', '.join(map(str, saved))}")
    state = abstract_state(config.method, Optimizer(config.optim, 1, 0))
    state = sharding.ShardingPlan(sharding.make_mesh()).abstract(state)
    step = saved[-1] if step is None else step
    return checkpoint.restore(run / "checkpoints", step, state, only=only)


def eval_tag(own: Config, settings: Config) -> str:
    """File name suffix for settings other than the run's own: the protocols and a hash of all settings."""
    if (own.eval, own.data, own.seed) == (settings.eval, settings.data, settings.seed):
        return ""
    values = [asdict(settings.eval), asdict(settings.data), settings.seed]
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
    return f"-{'+'.join(settings.eval.protocols)}-{digest}"


def evaluate(
    target: EvalTarget, progress: Progress = SILENT, baseline_cache: Path | None = None
) -> tuple[dict[str, Any], Path]:
    """Runs every protocol on the target, its untrained counterpart, raw pixels and the majority class.

    Returns the results and the file in evals/ that contains them. `baseline_cache`: see `report.evaluate`.
    """
    config = target.config
    if config.data.dataset in CLIP_DATASETS:
        raise UserError(f"data.dataset={config.data.dataset} has no labels, which a probe needs; name labeled images")
    sources = {split: open_source(config.data, split) for split in SPLIT_NAMES}
    check_channels(target, sources["train"].canvas_shape[2])
    if sources["train"].classes < 2:
        raise UserError(
            f"data.root={config.data.root}: all images are of one class, and a probe needs two;\n"
            "evaluate on labeled images: --data.root FOLDER, with train/CLASS and val/CLASS"
        )
    results = report.evaluate(
        feature_extractors(target),
        sources,
        config.eval,
        step=target.step,
        key=jr.fold_in(jr.key(config.seed), EVALUATION_KEY),
        loading={"num_threads": config.data.num_threads, "num_workers": config.data.num_workers},
        progress=progress,
        baseline_cache=baseline_cache,
    )
    results |= {"target": target.metadata, "data": configs.to_dict(config.data)}
    return results, report.write_report(results, target.folder, target.name)


def feature_extractors(target: EvalTarget) -> dict[str, FeatureExtractor]:
    """The rows of the results table."""
    crop, pool = target.crop, target.config.eval.pool
    return {
        "trained": ViTFeatures(target.trained, crop, pool),
        "untrained": ViTFeatures(target.untrained, crop, pool),
        "pixels": PixelFeatures(crop, target.trained.config.patch_size),
    }


def check_channels(target: EvalTarget, channels: int) -> None:
    """Raises `UserError` if the encoder reads another number of channels than the images have."""
    expected = target.trained.config.in_channels
    if expected != channels:
        raise UserError(
            f"the encoder reads {expected} channels, but the images of data.dataset={target.config.data.dataset} have"
            f" {channels};\nset --data.channels {expected}"
        )


def load_run_config(run: Path) -> Config:
    """Loads a run folder's config. Raises `UserError` with the nearest run folder, or with what is there instead."""
    if not (run / "config.yaml").is_file():
        check_format(run)
        near = sorted(str(path.parent) for path in run.parent.glob("*/config.yaml"))
        hint = configs.suggest(str(run), near) if near else f"there is no run in {run.parent}"
        raise UserError(f"{run} is not a run folder: it has no config.yaml; {hint}")
    return configs.load(Config, run / "config.yaml")
