"""The evaluation: every row of the table by the same protocols, written as JSON and shown as text."""

import dataclasses
import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from rich.table import Table

import jepax
from jepax.data import Source
from jepax.evals.baselines import majority_class
from jepax.evals.eval_dataset import EvalDataset, count_duplicates, hide_labels
from jepax.evals.feature_extractor import FeatureExtractor, ViTFeatures
from jepax.evals.head_training import crop_features
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.evals.protocols import PROTOCOLS, EvalConfig, supports
from jepax.evals.scoring import FittedProbe, check_labels, compute_accuracy, topk_classes
from jepax.health.metrics import collapse_metrics, feature_std, lidar, rankme
from jepax.types import PRNGKeyArray, UserError

ROW_TITLES = {
    "trained": "trained encoder",
    "untrained": "untrained encoder",
    "pixels": "raw pixels",
    "majority": "majority class",
}
"""Keys of the results and their names in the table, in the table's order."""
SPLIT_NAMES = ("train", "validation", "test")
BASELINES = ("untrained", "pixels")
MAX_HEALTH_EXAMPLES = 4096
"""At most so many validation examples, spread evenly, are read for signs of collapse."""
HEALTH_KEY = 1
"""Folded into the evaluation's key for the crops that LiDAR reads."""
LIDAR_IMAGES_AND_CROPS = 512, 8
"""Pictures, and random crops of each."""


@dataclass(frozen=True)
class Evaluation:
    """What the rows of one evaluation share."""

    sources: dict[str, Source]
    """By split; `validation` must share no picture with the other two, and `test` none with any."""
    config: EvalConfig
    key: PRNGKeyArray
    reading: dict[str, int] = field(default_factory=dict)
    """Threads and worker processes that read pictures."""
    say: ProgressReporter = SILENT_PROGRESS

    @property
    def classes(self) -> int:
        return self.sources["train"].classes

    def row(self, name: str, frozen: FeatureExtractor) -> dict[str, Any]:
        """Every protocol on one row. Protocols get the test split without its labels, which are read here alone."""
        splits = {
            split: EvalDataset(
                frozen,
                hide_labels(source) if split == "test" else source,
                self.config.batch_size,
                **self.reading,
                name=f"{ROW_TITLES[name]}: features of {split}",
                say=self.say,
            )
            for split, source in self.sources.items()
        }
        row = {}
        for protocol in self.config.protocols:
            if not supports(protocol, frozen):
                continue
            self.say.line(f"{ROW_TITLES[name]}: {protocol.replace('_', ' ')}")
            settings = getattr(self.config, protocol)
            arguments = (splits["train"], splits["validation"], self.classes, settings)
            fitted = PROTOCOLS[protocol](*arguments, key=self.key, say=self.say)
            row[protocol] = self._scored(fitted, splits["test"])
        row |= health_metrics(splits["validation"], jr.fold_in(self.key, HEALTH_KEY))
        return row if name in BASELINES else row | {"shared_pictures": self._shared(splits)}

    def _shared(self, splits: dict[str, EvalDataset]) -> dict[str, int]:
        """Pictures that stand in two splits, which are the same ones whatever the row."""
        shared = count_duplicates(splits)
        for pair, count in shared.items():
            if count:
                self.say.line(f"warning: {count} pictures of {pair.replace('/', ' and ')} are the same")
        return shared

    def _scored(self, fitted: list[FittedProbe], test: EvalDataset) -> dict[str, Any]:
        """The first answer, and the others beside it; answers of one name by their mean and standard deviation."""
        labels = self.sources["test"].labels
        by_name: dict[str, list[dict[str, Any]]] = {}
        for answer in fitted:
            scored = asdict(compute_accuracy(answer.guess(test), labels))
            told = {**scored, "variant": answer.variant, "chosen": answer.settings, "tried": answer.tried}
            by_name.setdefault(answer.name, []).append(told)
        first, *others = ((name, aggregate_runs(runs)) for name, runs in by_name.items())
        return {"name": first[0], **first[1], "beside": dict(others)}


def health_metrics(split: EvalDataset, key: PRNGKeyArray) -> dict[str, Any]:
    """Signs of collapse in the last layer's features, which need no label. LiDAR is for encoders alone.

    LiDAR from 512 pictures of 8 random crops each, where its paper takes more of both.
    """
    last = split.features.last[:: -(-len(split) // MAX_HEALTH_EXAMPLES)]
    found = {
        "effective_rank": rankme(last),
        "feature_std": feature_std(last),
        "health": collapse_metrics(last, "feature"),
    }
    if isinstance(split.row, ViTFeatures):
        found["health"]["feature_lidar"] = lidar(crop_features(split, *LIDAR_IMAGES_AND_CROPS, key))
    return found


def aggregate_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run as it is; several as their means, with the standard deviation of top-1 over them.

    The interval is the mean of the runs' own: of one run on other test examples.
    """
    if len(runs) == 1:
        return runs[0]
    means = {name: float(np.mean([run[name] for run in runs])) for name in ("top1", "top5")}
    means["interval"] = [float(bound) for bound in np.mean([run["interval"] for run in runs], axis=0)]
    return {**means, "deviation": float(np.std([run["top1"] for run in runs], ddof=1)), "runs": runs}


def evaluate_rows(
    rows: dict[str, FeatureExtractor],
    sources: dict[str, Source],
    config: EvalConfig | None = None,
    *,
    step: int,
    key: PRNGKeyArray,
    reading: dict[str, int] | None = None,
    say: ProgressReporter = SILENT_PROGRESS,
    floors: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the rows, the majority class beside them; plain values, ready for JSON.

    Every row is judged from the same key by the same protocols. Accuracies are in percent.

    - `rows`: by the names of `ROWS`; "trained" is the encoder of `step`.
    - `reading`: threads and worker processes that read pictures.
    - `floors`: a folder to keep the rows of `FLOORS` in, and to take them from where another evaluation with the same
      protocols, key, data and features left them. None measures them here.

    **Raises** `UserError` for a split without examples or labels, and for features that are not finite.
    """
    config = EvalConfig() if config is None else config
    shared = Evaluation(sources, config, key, reading or {}, say)
    for split in SPLIT_NAMES:
        check_labels(sources[split].labels, shared.classes, split)
    measured = {
        name: _cached(name, frozen, shared, floors) if name in BASELINES and floors else shared.row(name, frozen)
        for name, frozen in rows.items()
    }
    frequent = majority_class(sources["train"].labels, shared.classes)
    guesses = np.tile(topk_classes(frequent[None]), (len(sources["test"]), 1))
    measured["majority"] = asdict(compute_accuracy(guesses, sources["test"].labels))
    protocol = {
        **asdict(config),
        "classes": shared.classes,
        "examples": {split: len(source) for split, source in sources.items()},
        "key": jax.random.key_data(key).tolist(),
    }
    return _to_json_values({"step": step, "rows": measured, "protocol": protocol, "versions": software_versions()})


def _cached(name: str, frozen: FeatureExtractor, shared: Evaluation, folder: Path) -> dict[str, Any]:
    """A floor's row, from the folder where it lies there.

    Its file is named by what decides it: protocols, versions, key, every label, and the features of each split's first
    batch, which stand for the others.
    """
    decides = [asdict(shared.config), software_versions(), jax.random.key_data(shared.key).tolist(), name]
    digest = hashlib.sha256(json.dumps(decides).encode())
    for source in shared.sources.values():
        images, _ = next(iter(EvalDataset(frozen, source, shared.config.batch_size).pictures()))
        digest.update(np.asarray(eqx.filter_jit(frozen)(dataclasses.replace(images, label=None))).tobytes())
        digest.update(source.labels.tobytes())
    path = folder / f"{name}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        _write_json(shared.row(name, frozen), path)
    return json.loads(path.read_text())


def _to_json_values(value: Any) -> Any:
    """The same tree as JSON gives it back: tuples become lists, NumPy's numbers Python's, what is not finite None."""
    if isinstance(value, dict):
        return {key: _to_json_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_values(inner) for inner in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def software_versions() -> dict[str, str]:
    """What computed the numbers: versions and the kind of device."""
    return {
        "jepax": jepax.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def write_report(results: dict[str, Any], run: Path, name: str) -> Path:
    """Write `run`/evals/`name`.json, whole or not at all, and return its path.

    **Raises** `UserError` if the name is not a plain file name.
    """
    if not name or Path(name).name != name:
        raise UserError(f"evaluation name={name!r} is not a plain file name; try 'final'")
    return _write_json(results, run / "evals" / f"{name}.json")


def _write_json(values: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(_to_json_values(values), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def results_table(results: dict[str, Any]) -> Table:
    """The results as a table: test accuracies in percent, top-1 with its interval or its deviation."""
    protocols = results["protocol"]["protocols"]
    out = Table(title=f"step {results['step']}: test top-1, %, and its 95% interval (±: deviation over seeds)")
    out.add_column("features")
    for protocol in protocols:
        out.add_column(protocol.replace("_", " "), justify="right")
    out.add_column("chosen on validation")
    for name, title in ROW_TITLES.items():
        if name in results["rows"]:
            out.add_row(title, *_row_cells(results["rows"][name], protocols))
    return out


def _row_cells(row: dict[str, Any], protocols: list[str]) -> list[str]:
    if "top1" in row:  # the majority class: one number, whatever classifies
        return [f"{row['top1']:.2f}"] * len(protocols) + [""]
    variants = [row[protocol].get("variant", "") for protocol in protocols if protocol in row]
    shown = [
        format_top1(row[protocol]) + answer_suffix(row[protocol]) if protocol in row else "" for protocol in protocols
    ]
    return [*shown, "; ".join(filter(None, variants))]


def answer_suffix(score: dict[str, Any]) -> str:
    """Which of a protocol's answers it is, where that is not plain."""
    return f", {score['name']}" if "deviation" in score else ""


def format_top1(score: dict[str, Any]) -> str:
    """`86.58 (85.90-87.24)`, or `61.20 ± 0.85` over several seeds."""
    if "deviation" in score:
        return f"{score['top1']:.2f} ± {score['deviation']:.2f}"
    low, high = score["interval"]
    return f"{score['top1']:.2f} ({low:.1f}-{high:.1f})"


def controls_table(results: dict[str, Any]) -> Table | None:
    """What stands beside the scores: controls of the linear probe's width, every shot; None where there is nothing."""
    rows = {name: row for name, row in results["rows"].items() if name in ROW_TITLES and "top1" not in row}
    found = [
        (protocol, name)
        for protocol in results["protocol"]["protocols"]
        for name in next(iter(rows.values())).get(protocol, {}).get("beside", {})
    ]
    if not found:
        return None
    out = Table(title="beside: test top-1, %")
    out.add_column("protocol")
    for name in rows:
        out.add_column(ROW_TITLES[name], justify="right")
    for protocol, name in found:
        scored = [row.get(protocol, {}).get("beside", {}).get(name) for row in rows.values()]
        label = f"{protocol.replace('_', ' ')}: {name}"
        out.add_row(label, *(format_top1(score) if score else "" for score in scored))
    return out
