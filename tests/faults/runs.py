"""A tiny run, what the processes of these tests are told to train, and what two runs must have in common."""

import json
from dataclasses import replace
from pathlib import Path

from jepax.io import checkpoint, logger
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig
from jepax.training import evaluation
from jepax.training.config import Config
from tests.contracts.shrink import shrunk
from tests.digest import state_digest

STEPS, EVERY = 300, 20
SPEED = {"perf/step_time", "perf/images_per_sec", "val/seconds"}
"""Parts of a line of the log that are no part of the result."""


def tiny(recipe: str = "ijepa_fashion_mnist", **changes: object) -> Config:
    """Lines of the log at other steps than checkpoints; one quick protocol at the end, of images. `changes`: to
    `train`."""
    config = shrunk(recipe)
    settings = {
        "steps": STEPS,
        "log_every_steps": 7,
        "checkpoint": CheckpointConfig(every_steps=EVERY, max_to_keep=2),
    } | changes
    online = replace(config.eval.online, every_steps=0)
    return replace(
        config, train=replace(config.train, **settings), eval=replace(config.eval, protocols=("knn",), online=online)
    )


def result(run: Path) -> tuple[int, str]:
    """The last checkpoint's step, and the digest of its state."""
    state = evaluation.load_state(configs.load(Config, run / "config.yaml"), run, only=checkpoint.ALL_ARRAYS)
    return int(state.step), state_digest(state)


def log(run: Path) -> list[dict]:
    """The lines of the log but for their speeds."""
    lines = logger.read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def same(run: Path, other: Path) -> None:
    """Fails unless both ended with the same state, the same log and the same alarms, and left nothing unfinished."""
    assert result(run) == result(other)
    assert log(run) == log(other)
    health, wanted = (json.loads((each / "health.json").read_text()) for each in (run, other))
    assert health == wanted
    assert checkpoint.partial_checkpoints(run / "checkpoints") == []
    assert checkpoint.list_steps(run / "checkpoints") == checkpoint.list_steps(other / "checkpoints")
