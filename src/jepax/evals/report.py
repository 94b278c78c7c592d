"""Evaluates every row of the results table by the same protocols; writes the results as JSON and shows tables."""

import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
from rich.table import Table

import jepax
from jepax.data import Source
from jepax.evals.checks import check_labels
from jepax.evals.eval_dataset import EvalDataset, count_duplicates, random_subset, without_labels
from jepax.evals.feature_extractor import FeatureExtractor, LayerFeatures, ViTFeatures
from jepax.evals.features import run_batches
from jepax.evals.progress import SILENT, Progress
from jepax.evals.protocols import PROTOCOLS, EvalConfig, supports
from jepax.evals.scoring import FittedProbe, ProtocolData, accuracy, topk
from jepax.health.metrics import collapse_metrics, feature_std, lidar, rankme
from jepax.types import Float, ImageBatch, PRNGKeyArray, UserError

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
        title = ROW_TITLES[name]
        data = {
            split: EvalDataset(
                extractor,
                without_labels(source) if split == "test" else source,
                self.config.batch_size,
                name=f"{title}: features of {split}",
                progress=self.progress,
                **self.loading,
            )
            for split, source in self.sources.items()
        }
        inputs, row = ProtocolData(data["train"], data["validation"], self.classes, self.key, self.progress), {}
        for protocol in self.config.protocols:
            if supports(protocol, extractor):
                self.progress.log(f"{title}: {protocol.replace('_', ' ')}")
                fitted = PROTOCOLS[protocol](inputs, getattr(self.config, protocol))
                row[protocol] = self._score(fitted, data["test"])
        row |= health_metrics(data["validation"], jr.fold_in(self.key, HEALTH_KEY))
        # Duplicates are the same for every row, so they are counted once.
        return row if name in BASELINES else row | {"duplicate_images": self._count_duplicates(data)}

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

    def majority(self) -> dict[str, Any]:
        """Accuracy of always predicting the most frequent classes of the training split, ties by class number."""
        counts = np.bincount(self.sources["train"].labels, minlength=self.classes)
        labels = self.sources["test"].labels
        return asdict(accuracy(np.tile(topk(counts[None].astype(np.float32)), (len(labels), 1)), labels))


def health_metrics(dataset: EvalDataset, key: PRNGKeyArray) -> dict[str, Any]:
    """Collapse metrics of the last layer's features, without labels. LiDAR is computed for encoders only.

    LiDAR uses 512 images with 8 random crops each; its paper uses more of both.
    """
    last = dataset.features.last[:: -(-len(dataset) // MAX_HEALTH_EXAMPLES)]
    metrics = collapse_metrics(last, "feature")
    if isinstance(dataset.extractor, ViTFeatures):
        metrics["feature/lidar"] = lidar(crop_features(dataset, LIDAR_IMAGES, LIDAR_CROPS, key))
    return {"effective_rank": rankme(last), "feature_std": feature_std(last), "health": metrics}


def crop_features(
    dataset: EvalDataset, images: int, crops: int, key: PRNGKeyArray
) -> Float[np.ndarray, "images crops dim"]:
    """The last layer's features of several random crops of each image of a random subset."""
    extractor, source = dataset.extractor, random_subset(dataset.source, images)
    subset, keys = EvalDataset(extractor, source, dataset.batch_size, **dataset.loading), jr.split(key, crops)

    def embed(batch: ImageBatch) -> list[LayerFeatures]:
        return [extractor.of_crops(batch, each, extractor.crop) for each in keys]

    batches = run_batches(embed, subset.images())
    return np.concatenate([np.stack([np.asarray(x)[-1, :valid] for x in crops], 1) for crops, valid in batches])


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
    for split in SPLIT_NAMES:
        check_labels(sources[split].labels, evaluation.classes, split)
    results = {name: _cached_row(name, extractor, evaluation, baseline_cache) for name, extractor in rows.items()}
    results["majority"] = evaluation.majority()
    protocol = {
        **asdict(config),
        "classes": evaluation.classes,
        "examples": {split: len(source) for split, source in sources.items()},
        "key": jax.random.key_data(key).tolist(),
    }
    return _to_json({"step": step, "rows": results, "protocol": protocol, "versions": software_versions()})


def _cached_row(name: str, extractor: FeatureExtractor, evaluation: Evaluation, folder: Path | None) -> dict[str, Any]:
    """Returns a row, from the folder if it is a baseline's that is stored there.

    The file name is a hash of everything that determines the row: protocols, versions, key, every label, and the
    features of each split's first batch, which represent the others.
    """
    if folder is None or name not in BASELINES:
        return evaluation.row(name, extractor)
    settings = [asdict(evaluation.config), software_versions(), jax.random.key_data(evaluation.key).tolist(), name]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for source in evaluation.sources.values():
        images, _ = next(iter(EvalDataset(extractor, source, evaluation.config.batch_size).images()))
        digest.update(np.asarray(extractor(replace(images, label=None))).tobytes())
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
    protocols, rows = results["protocol"]["protocols"], results["rows"]
    title = f"step {results['step']}: test top-1 (%) and its 95% interval (±: standard deviation over seeds)"
    out = Table("features", title=title)
    for protocol in protocols:
        out.add_column(protocol.replace("_", " "), justify="right")
    out.add_column("chosen on validation")
    for name in ROW_TITLES:
        if name in rows:
            out.add_row(ROW_TITLES[name], *_row_cells(rows[name], protocols))
    return out


def _row_cells(row: dict[str, Any], protocols: list[str]) -> list[str]:
    if "top1" in row:  # the majority class has one number for all protocols
        return [f"{row['top1']:.2f}"] * len(protocols) + [""]
    scores = [row.get(protocol, {}) for protocol in protocols]
    # A protocol may have several aggregated results, so their names are shown.
    names = [f", {score['name']}" if "std" in score else "" for score in scores]
    cells = [format_top1(score) + name for score, name in zip(scores, names, strict=True)]
    return [*cells, "; ".join(score["variant"] for score in scores if score.get("variant"))]


def format_top1(score: dict[str, Any]) -> str:
    """`86.58 (85.90-87.24)`, or `61.20 ± 0.85` over several seeds; empty without a score."""
    if "std" in score:
        return f"{score['top1']:.2f} ± {score['std']:.2f}"
    return "{:.2f} ({:.1f}-{:.1f})".format(score["top1"], *score["ci95"]) if score else ""


def controls_table(results: dict[str, Any]) -> Table | None:
    """Other results of the protocols: the linear probe's width controls, the other shots. None without any."""
    rows = {name: row for name, row in results["rows"].items() if name in ROW_TITLES and "top1" not in row}
    out = Table("protocol", title="controls: test top-1 (%)")
    for name in rows:
        out.add_column(ROW_TITLES[name], justify="right")
    for protocol in results["protocol"]["protocols"]:
        scores = [row.get(protocol, {}).get("controls", {}) for row in rows.values()]
        for name in scores[0]:
            label = f"{protocol.replace('_', ' ')}: {name}"
            out.add_row(label, *(format_top1(controls.get(name, {})) for controls in scores))
    return out if out.row_count else None
