"""The evaluation at the end of a run: every row of the table by one protocol, written as JSON and shown as text."""

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from rich.table import Table

import jepax
from jepax.evals.features import Embed, Features, extract
from jepax.evals.floors import majority_class
from jepax.evals.health import effective_rank, feature_std
from jepax.evals.knn import KnnConfig, knn
from jepax.evals.probe import ProbeConfig, linear_probe
from jepax.types import Images, PRNGKeyArray, UserError

Sweep = Callable[[], Iterable[tuple[Images, int]]]
"""Starts one pass over a split: batches of one shape, each with the number of its valid examples."""

ROWS = {
    "trained": "trained encoder",
    "untrained": "untrained encoder",
    "pixels": "raw pixels",
    "majority": "majority class",
}
"""Keys of the results and their names in the table, in the table's order."""

COLLAPSE_EXAMPLES = 4096
"""At most so many validation examples measure the effective rank."""


@dataclass(frozen=True)
class EvalConfig:
    """The protocol of the evaluation."""

    batch_size: int = 256
    """Images per batch when features are extracted; whoever makes the sweeps reads it."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The linear probe's sweep."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """How the nearest neighbours vote."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True)
class Splits:
    """How to pass over each split; `validation` must share no example with the other two."""

    train: Sweep
    validation: Sweep
    test: Sweep


def evaluate_all(
    trained: Embed,
    untrained: Embed | None,
    pixels: Embed,
    splits: Splits,
    classes: int,
    config: EvalConfig | None = None,
    *,
    step: int,
    key: PRNGKeyArray,
    say: Callable[[str], None] = lambda line: None,
    floors: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the encoder of `step`, the same encoder before training, and the floors; plain values, ready for JSON.

    Every row is trained from the same key, and passes over each split once, the test split included. Accuracies are in
    percent, times in seconds.

    - `untrained`: None leaves its row out.
    - `pixels`: `floors.RawPixels` of the view that the encoders see.
    - `say`: receives a line when something begins.
    - `floors`: a folder to keep the rows of `untrained` and `pixels` in, and to take them from where another run with
      the same protocol, key, data and features left them. None measures them here.

    **Raises** `UserError` for a split without examples or labels, and for features that are not finite.
    """
    config = EvalConfig() if config is None else config
    row = partial(_row, splits=splits, classes=classes, config=config, key=key, say=say)
    rows = {}
    rows["trained"], labels = row(ROWS["trained"], trained)
    counts = {split: len(values) for split, values in labels.items()}
    for name, embed in (("untrained", untrained), ("pixels", pixels)):
        if embed is not None:
            decides = [asdict(config), classes, versions(), jr.key_data(key).tolist(), name]
            rows[name] = _floor(name, embed, row, splits, json.dumps(decides), labels, floors)
    rows["majority"] = asdict(majority_class(labels["train"], labels["test"], classes))
    protocol = {**asdict(config), "classes": classes, "examples": counts, "key": jr.key_data(key).tolist()}
    return _plain({"step": step, "rows": rows, "protocol": protocol, "versions": versions()})


def _row(
    name: str,
    embed: Embed,
    splits: Splits,
    classes: int,
    config: EvalConfig,
    key: PRNGKeyArray,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One row of the results, and the labels of the three splits."""
    say(f"{name}: features")
    start = time.perf_counter()
    features = {split: extract(embed, getattr(splits, split)()) for split in ("train", "validation", "test")}
    extracted = time.perf_counter()
    say(f"{name}: linear probe")
    linear = linear_probe(*features.values(), classes, config.probe, key=key)
    say(f"{name}: nearest neighbours")
    probed = time.perf_counter()
    neighbours = knn(features["train"], features["test"], classes, config.knn)
    seconds = {"features": extracted - start, "linear": linear.seconds, "knn": time.perf_counter() - probed}
    row = {
        "linear": {**asdict(linear.test), "chosen": asdict(linear.chosen), "variant": str(linear.chosen)},
        "grid": [asdict(variant) for variant in linear.grid],
        "knn": asdict(neighbours),
        **_collapse(features["validation"]),
        "seconds": seconds,
    }
    return row, {split: values.labels for split, values in features.items()}


def _floor(
    name: str,
    embed: Embed,
    row: Callable[[str, Embed], tuple[dict[str, Any], Any]],
    splits: Splits,
    decides: str,
    labels: dict[str, np.ndarray],
    kept: Path | None,
) -> dict[str, Any]:
    """A floor's row, from the folder `kept` where it lies there.

    Its file is named by what decides it: protocol, versions, key, every label, and the features of each split's first
    batch, which stand for the others.
    """
    if kept is None:
        return row(ROWS[name], embed)[0]
    firsts = [next(iter(getattr(splits, split)()))[0] for split in ("train", "validation", "test")]
    digest = hashlib.sha256(decides.encode())
    for images, of_split in zip(firsts, labels.values(), strict=True):
        digest.update(np.asarray(eqx.filter_jit(embed)(dataclasses.replace(images, label=None))).tobytes())
        digest.update(of_split.tobytes())
    path = kept / f"{name}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        _write_whole(row(ROWS[name], embed)[0], path)
    return json.loads(path.read_text())


def _collapse(features: Features) -> dict[str, float]:
    """Effective rank and feature std of the last layer, on examples spread evenly over the split."""
    stride = -(-len(features.last) // COLLAPSE_EXAMPLES)
    some = features.last[::stride]
    return {"effective_rank": float(effective_rank(some)), "feature_std": float(feature_std(some))}


def _plain(value: Any) -> Any:
    """The same tree as JSON gives it back: tuples become lists, NumPy's numbers Python's."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def versions() -> dict[str, str]:
    """What computed the numbers: versions and the kind of device."""
    return {
        "jepax": jepax.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def write(results: dict[str, Any], run: Path, name: str) -> Path:
    """Write `run`/evals/`name`.json, whole or not at all, and return its path.

    **Raises** `UserError` if the name is not a plain file name.
    """
    if not name or Path(name).name != name:
        raise UserError(f"evaluation name={name!r} is not a plain file name; try 'final'")
    return _write_whole(results, run / "evals" / f"{name}.json")


def _write_whole(values: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(_plain(values), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def table(results: dict[str, Any]) -> Table:
    """The results as a table: accuracies on the test split, in percent."""
    out = Table(title=f"step {results['step']}: test accuracy, %")
    out.add_column("features")
    for title in ("linear top-1", "linear top-5", "kNN top-1", "kNN top-5"):
        out.add_column(title, justify="right")
    out.add_column("chosen on validation")
    for name, title in ROWS.items():
        if name in results["rows"]:
            out.add_row(title, *_cells(results["rows"][name]))
    return out


def _cells(row: dict[str, Any]) -> list[str]:
    if "linear" not in row:  # the majority class: one pair of numbers, whatever classifies
        return [f"{row[k]:.2f}" for k in ("top1", "top5")] * 2 + [""]
    accuracies = [f"{row[kind][k]:.2f}" for kind in ("linear", "knn") for k in ("top1", "top5")]
    return [*accuracies, row["linear"]["variant"]]
