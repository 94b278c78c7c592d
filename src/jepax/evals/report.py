"""Evaluates every row of the results table by the same protocols; writes the results as JSON and shows tables."""

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
from jepax.evals.augmentation import crop_features
from jepax.evals.baselines import class_counts
from jepax.evals.checks import check_labels
from jepax.evals.eval_dataset import EvalDataset, count_duplicates, without_labels
from jepax.evals.feature_extractor import FeatureExtractor, ViTFeatures
from jepax.evals.progress import SILENT, Progress
from jepax.evals.protocols import PROTOCOLS, EvalConfig, supports
from jepax.evals.scoring import FittedProbe, ProtocolData, accuracy, topk
from jepax.health.metrics import collapse_metrics, feature_std, lidar, rankme
from jepax.types import PRNGKeyArray, UserError

ROW_TITLES = {
    "trained": "trained encoder",
    "untrained": "untrained encoder",
    "pixels": "raw pixels",
    "majority": "majority class",
}
"""Row titles by key, in the table's order."""
SPLIT_NAMES = ("train", "validation", "test")
BASELINES = ("untrained", "pixels")
MAX_HEALTH_EXAMPLES = 4096
"""Most validation examples, evenly spaced, that collapse metrics are computed on."""
HEALTH_KEY = 1
"""Constant folded into the evaluation's key for LiDAR's crops."""
LIDAR_IMAGES, LIDAR_CROPS = 512, 8


@dataclass(frozen=True)
class Evaluation:
    """Data and settings common to the rows of one evaluation."""

    sources: dict[str, Source]
    """Sources by split; no two of them may have an image in common."""
    config: EvalConfig
    key: PRNGKeyArray
    loading: dict[str, int] = field(default_factory=dict)
    """Threads and worker processes that read images."""
    progress: Progress = SILENT

    @property
    def classes(self) -> int:
        return self.sources["train"].classes

    def row(self, name: str, extractor: FeatureExtractor) -> dict[str, Any]:
        """Runs every protocol on one extractor. Only this class reads the test split's labels."""
        data = {
            split: EvalDataset(
                extractor,
                without_labels(source) if split == "test" else source,
                self.config.batch_size,
                **self.loading,
                name=f"{ROW_TITLES[name]}: features of {split}",
                progress=self.progress,
            )
            for split, source in self.sources.items()
        }
        row = {}
        for protocol in self.config.protocols:
            if not supports(protocol, extractor):
                continue
            self.progress.log(f"{ROW_TITLES[name]}: {protocol.replace('_', ' ')}")
            inputs = ProtocolData(data["train"], data["validation"], self.classes, self.key, self.progress)
            fitted = PROTOCOLS[protocol](inputs, getattr(self.config, protocol))
            row[protocol] = self._score(fitted, data["test"])
        row |= health_metrics(data["validation"], jr.fold_in(self.key, HEALTH_KEY))
        # Duplicates are the same for every row, so they are counted once.
        return row if name in BASELINES else row | {"shared_pictures": self._count_duplicates(data)}

    def _count_duplicates(self, data: dict[str, EvalDataset]) -> dict[str, int]:
        duplicates = count_duplicates(data)
        for pair, count in duplicates.items():
            if count:
                self.progress.log(f"warning: {count} images of {pair.replace('/', ' and ')} are identical")
        return duplicates

    def _score(self, fitted: list[FittedProbe], test: EvalDataset) -> dict[str, Any]:
        """The protocol's first result, with its others as controls; results of one name are aggregated."""
        labels = self.sources["test"].labels
        by_name: dict[str, list[dict[str, Any]]] = {}
        for probe in fitted:
            scores = asdict(accuracy(probe.predict(test), labels))
            info = {"variant": probe.variant, "best": probe.settings, "trials": probe.trials}
            by_name.setdefault(probe.name, []).append(scores | info)
        (name, first), *controls = ((name, aggregate_runs(runs)) for name, runs in by_name.items())
        return {"name": name, **first, "controls": dict(controls)}


def health_metrics(dataset: EvalDataset, key: PRNGKeyArray) -> dict[str, Any]:
    """Collapse metrics of the last layer's features, without labels. LiDAR is computed for encoders only.

    LiDAR uses 512 images with 8 random crops each; its paper uses more of both.
    """
    last = dataset.features.last[:: -(-len(dataset) // MAX_HEALTH_EXAMPLES)]
    metrics = collapse_metrics(last, "feature")
    if isinstance(dataset.extractor, ViTFeatures):
        metrics["feature/lidar"] = lidar(crop_features(dataset, LIDAR_IMAGES, LIDAR_CROPS, key))
    return {"effective_rank": rankme(last), "feature_std": feature_std(last), "health": metrics}


def aggregate_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a single run unchanged, several as their means with the standard deviation of top-1.

    The interval is the mean of the runs' intervals, so it is that of one run on other test examples.
    """
    if len(runs) == 1:
        return runs[0]
    means = {name: float(np.mean([run[name] for run in runs])) for name in ("top1", "top5")}
    means["ci95"] = [float(bound) for bound in np.mean([run["ci95"] for run in runs], axis=0)]
    return {**means, "std": float(np.std([run["top1"] for run in runs], ddof=1)), "runs": runs}


def evaluate(
    rows: dict[str, FeatureExtractor],
    sources: dict[str, Source],
    config: EvalConfig | None = None,
    *,
    step: int,
    key: PRNGKeyArray,
    loading: dict[str, int] | None = None,
    progress: Progress = SILENT,
    baseline_cache: Path | None = None,
) -> dict[str, Any]:
    """Evaluates the rows and the majority class. Returns plain values, ready for JSON; accuracies are in percent.

    Every row uses the same key and the same protocols.

    - `rows`: by the names of `ROW_TITLES`; "trained" is the encoder of `step`.
    - `loading`: threads and worker processes that read images.
    - `baseline_cache`: folder for the rows of `BASELINES`, which are read from it if an evaluation with the same
      protocols, key, data and features stored them. None: they are evaluated.

    **Raises** `UserError` for a split without examples or labels, and for features that are not finite.
    """
    config = EvalConfig() if config is None else config
    evaluation = Evaluation(sources, config, key, loading or {}, progress)
    classes = evaluation.classes
    for split in SPLIT_NAMES:
        check_labels(sources[split].labels, classes, split)
    results = {
        name: _cached(name, extractor, evaluation, baseline_cache)
        if name in BASELINES and baseline_cache
        else evaluation.row(name, extractor)
        for name, extractor in rows.items()
    }
    majority = np.tile(topk(class_counts(sources["train"].labels, classes)[None]), (len(sources["test"]), 1))
    results["majority"] = asdict(accuracy(majority, sources["test"].labels))
    protocol = {
        **asdict(config),
        "classes": classes,
        "examples": {split: len(source) for split, source in sources.items()},
        "key": jax.random.key_data(key).tolist(),
    }
    return _to_json({"step": step, "rows": results, "protocol": protocol, "versions": software_versions()})


def _cached(name: str, extractor: FeatureExtractor, evaluation: Evaluation, folder: Path) -> dict[str, Any]:
    """Returns a baseline's row, from the folder if it is stored there.

    The file name is a hash of everything that determines the row: protocols, versions, key, every label, and the
    features of each split's first batch, which represent the others.
    """
    settings = [asdict(evaluation.config), software_versions(), jax.random.key_data(evaluation.key).tolist(), name]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for source in evaluation.sources.values():
        images, _ = next(iter(EvalDataset(extractor, source, evaluation.config.batch_size).images()))
        digest.update(np.asarray(eqx.filter_jit(extractor)(dataclasses.replace(images, label=None))).tobytes())
        digest.update(source.labels.tobytes())
    path = folder / f"{name}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        _write_atomic(evaluation.row(name, extractor), path)
    return json.loads(path.read_text())


def _to_json(value: Any) -> Any:
    """The tree as JSON returns it: tuples become lists, NumPy numbers Python numbers, non-finite numbers None."""
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def software_versions() -> dict[str, str]:
    """Versions and the kind of device that computed the numbers."""
    return {
        "jepax": jepax.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def write_report(results: dict[str, Any], run: Path, name: str) -> Path:
    """Writes `run`/evals/`name`.json atomically and returns its path.

    **Raises** `UserError` if the name is not a plain file name.
    """
    if not name or Path(name).name != name:
        raise UserError(f"evaluation name={name!r} is not a plain file name; try 'final'")
    return _write_atomic(results, run / "evals" / f"{name}.json")


def _write_atomic(values: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(_to_json(values), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)
    return path


def results_table(results: dict[str, Any]) -> Table:
    """Test accuracies in percent: top-1 with its interval, or its standard deviation over seeds."""
    protocols = results["protocol"]["protocols"]
    out = Table(title=f"step {results['step']}: test top-1 (%) and its 95% interval (±: standard deviation over seeds)")
    out.add_column("features")
    for protocol in protocols:
        out.add_column(protocol.replace("_", " "), justify="right")
    out.add_column("chosen on validation")
    for name, title in ROW_TITLES.items():
        if name in results["rows"]:
            out.add_row(title, *_row_cells(results["rows"][name], protocols))
    return out


def _row_cells(row: dict[str, Any], protocols: list[str]) -> list[str]:
    if "top1" in row:  # the majority class has one number for all protocols
        return [f"{row['top1']:.2f}"] * len(protocols) + [""]
    variants = [row[protocol].get("variant", "") for protocol in protocols if protocol in row]
    cells = [
        format_top1(row[protocol]) + result_name(row[protocol]) if protocol in row else "" for protocol in protocols
    ]
    return [*cells, "; ".join(filter(None, variants))]


def result_name(score: dict[str, Any]) -> str:
    """Name of an aggregated result; a protocol may have several."""
    return f", {score['name']}" if "std" in score else ""


def format_top1(score: dict[str, Any]) -> str:
    """`86.58 (85.90-87.24)`, or `61.20 ± 0.85` over several seeds."""
    if "std" in score:
        return f"{score['top1']:.2f} ± {score['std']:.2f}"
    low, high = score["ci95"]
    return f"{score['top1']:.2f} ({low:.1f}-{high:.1f})"


def controls_table(results: dict[str, Any]) -> Table | None:
    """Other results of the protocols: the linear probe's width controls, the other shots. None without any."""
    rows = {name: row for name, row in results["rows"].items() if name in ROW_TITLES and "top1" not in row}
    controls = [
        (protocol, name)
        for protocol in results["protocol"]["protocols"]
        for name in next(iter(rows.values())).get(protocol, {}).get("controls", {})
    ]
    if not controls:
        return None
    out = Table(title="controls: test top-1 (%)")
    out.add_column("protocol")
    for name in rows:
        out.add_column(ROW_TITLES[name], justify="right")
    for protocol, name in controls:
        scores = [row.get(protocol, {}).get("controls", {}).get(name) for row in rows.values()]
        label = f"{protocol.replace('_', ' ')}: {name}"
        out.add_row(label, *(format_top1(score) if score else "" for score in scores))
    return out
