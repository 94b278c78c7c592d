"""Any recipe at a size that a test can train: its method's `tiny()`, and generated images or episodes."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from jepax.data import CLIP_DATASETS, DataConfig
from jepax.data.simulate import frame_shape, make_environment
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig
from jepax.recipes import RECIPES
from jepax.training.config import Config, TrainConfig
from jepax.types import ClipBatch, ImageBatch

C = TypeVar("C")
SIDE, BATCH = 24, 16


def shrunk(name: str, **method: object) -> Config:
    """A recipe on 24x24 images cut into 6x6 patches, or on a few episodes. Precision is float32, as on every CPU."""
    config = RECIPES[name]()
    tiny = replace(config.method.tiny(), **method)
    return replace(
        config,
        method=tiny,
        data=tiny_data(config.data, tiny.encoder.in_channels),
        optim=replace(config.optim, warmup_epochs=0.1),
        train=TrainConfig(batch_size=BATCH, steps=6, log_every_steps=2, checkpoint=CheckpointConfig(every_steps=4)),
    )


def tiny_data(data: DataConfig, channels: int) -> DataConfig:
    """A little data of the same kind, generated."""
    if data.dataset in CLIP_DATASETS:
        return replace(data, dataset="two_room", canvas_size=32, num_episodes=5, val_fraction=0.2)
    return DataConfig(dataset="synthetic", canvas_size=SIDE, channels=channels, synthetic_size=80, val_fraction=0.2)


def blank_batch(config: Config, size: int = 8) -> ImageBatch | ClipBatch:
    """Zeros of the kind and, for clips, of the shape that the recipe reads."""
    index = np.arange(size, dtype=np.int32)
    if config.data.dataset in CLIP_DATASETS:
        env = make_environment("two_room", config.data.canvas_size)
        clip = (size, config.data.clip_frames)
        actions = np.zeros((*clip, config.data.frame_skip * env.action_dim), np.float32)
        return ClipBatch(np.zeros((*clip, *frame_shape(env)), np.uint8), actions, index)
    canvas = np.zeros((size, 64, 64, config.method.encoder.in_channels), np.uint8)
    return ImageBatch(canvas, np.full((size, 2), 64, np.int32), index)


def structure(config: Config) -> frozenset:
    """The shrunk method without its numbers: recipes that share it run the same program."""
    flat = {path: value for path, value in configs.flatten(config.method).items() if not path.endswith("init_std")}
    numbers = {path: _without_numbers(value) for path, value in flat.items()}
    return frozenset({("name", config.method.name), *numbers.items()})


def _without_numbers(value: object) -> str:
    """Zeros switch parts off; other fractions change no program."""
    fractions = value if isinstance(value, tuple) else (value,)
    if all(isinstance(each, float) for each in fractions):
        return str([each != 0 for each in fractions])
    return str(value)


def distinct() -> dict[str, Config]:
    """The shrunk recipes, one of each structure, under the names of all the recipes that share it."""
    found: dict[frozenset, list[str]] = {}
    for name in sorted(RECIPES):
        found.setdefault(structure(shrunk(name)), []).append(name)
    return {"+".join(names): shrunk(names[0]) for names in found.values()}


def replace_all(config: C, kind: type, change: Callable) -> C:
    """The config with every part of type `kind`, at any depth, changed; a part that is a property stays."""
    if isinstance(config, kind):
        return change(config)
    if not dataclasses.is_dataclass(config):
        return config
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return replace(config, **{name: replace_all(part, kind, change) for name, part in parts.items()})
