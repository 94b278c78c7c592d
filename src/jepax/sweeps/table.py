"""Loads a sweep's results from its runs' folders, and formats them as a table of rows and a CSV of runs."""

import csv
import io
import itertools
import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from jepax.data import DataConfig, open_source
from jepax.io import config_yaml, logger
from jepax.sweeps.base import Sweep, Variant
from jepax.training.config import Config, compute_total_steps

DIVERGED_FILE = "diverged.txt"
"""File with the reason why a run diverged, in its folder."""
TABLE_COLUMNS = (
    "row",
    "linear on validation",
    "linear",
    "kNN",
    "untrained: linear, kNN",
    "raw pixels: linear, kNN",
    "minutes",
    "rank",
    "seeds",
)


@dataclass(frozen=True)
class Result:
    """One finished run. Accuracies are top-1 in percent, on the test split except `validation`."""

    row: str
    seed: int
    validation: float
    """Validation accuracy of the linear probe, for choosing among rows."""
    linear: float
    knn: float
    untrained_linear: float
    untrained_knn: float
    pixels_linear: float
    pixels_knn: float
    majority: float
    minutes: float
    """Minutes of training, with compilation and without the evaluation."""
    effective_rank: float
    """Effective rank of the last layer's pooled features, on validation; near 1 at collapse."""
    untrained_rank: float
    steps: int
    batch_size: int
    device: str


def job_folder(folder: Path, row: Variant, seed: int) -> Path:
    """Folder of the run of one row and seed, in the sweep's folder."""
    return folder / f"{row.name}-seed{seed}"


def list_seeds(sweep: Sweep, folder: Path) -> list[int]:
    """Seeds of the sweep and of all its runs in the folder, ascending."""
    rows = {row.name for row in sweep.rows}
    parts = [path.name.rpartition("-seed") for path in folder.glob("*-seed*")]
    return sorted({*sweep.seeds, *(int(seed) for row, _, seed in parts if row in rows and seed.isdecimal())})


def load_results(sweep: Sweep, folder: Path) -> list[Result]:
    """Loads the sweep's finished runs, in the order of rows and seeds."""
    runs = [(row, seed, job_folder(folder, row, seed)) for row in sweep.rows for seed in list_seeds(sweep, folder)]
    return [load_result(row, seed, run) for row, seed, run in runs if find_evaluation(run)]


def find_evaluation(run: Path) -> Path | None:
    """Path of the evaluation at the run's last step, or None. Those of earlier steps do not count."""
    if not (run / "config.yaml").exists():
        return None
    config = config_yaml.load(Config, run / "config.yaml")
    path = run / "evals" / f"step_{compute_total_steps(config, count_train_images(config.data)):08d}.json"
    return path if path.exists() else None


@lru_cache
def count_train_images(data: DataConfig) -> int:
    return len(open_source(data, "train"))


def load_result(row: Variant, seed: int, run: Path) -> Result:
    """Loads the evaluation of a finished run, and its training time from its log."""
    evaluated = json.loads(find_evaluation(run).read_text())
    rows = evaluated["rows"]
    scores = [rows[name][kind]["top1"] for name in ("trained", "untrained", "pixels") for kind in ("linear", "knn")]
    return Result(
        row.name,
        seed,
        rows["trained"]["linear"]["best"]["validation_top1"],
        *scores,
        majority=rows["majority"]["top1"],
        minutes=sum_seconds(logger.read_metrics(run / logger.METRICS_FILE)) / 60,
        effective_rank=rows["trained"]["effective_rank"],
        untrained_rank=rows["untrained"]["effective_rank"],
        steps=evaluated["step"],
        batch_size=config_yaml.load(Config, run / "config.yaml").train.batch_size,
        device=evaluated["versions"]["device"],
    )


def sum_seconds(lines: list[dict]) -> float:
    """Seconds of all steps; a record has the mean over the steps since the record before it."""
    before = [-1, *(line["step"] for line in lines)]
    return sum((line["step"] - last) * line["perf/step_time"] for line, last in zip(lines, before, strict=False))


def to_markdown(sweep: Sweep, folder: Path, results: list[Result]) -> str:
    """Formats the table of rows: means over seeds, then each seed's score in parentheses, in the seeds' order.

    The text above it is `Sweep.about`; below it are the runs that diverged and the number of missing runs.
    """
    lines = [sweep.about, ""] if sweep.about else []
    lines += [f"| {' | '.join(TABLE_COLUMNS)} |", "|---" * len(TABLE_COLUMNS) + "|"]
    for row in sweep.rows:
        if runs := [result for result in results if result.row == row.name]:
            lines.append(f"| {' | '.join(_row_cells(row.name, runs))} |")

    # A run without a result diverged, with a note in its folder, or is missing.
    finished = {(result.row, result.seed) for result in results}
    notes, missing = [], 0
    for row, seed in itertools.product(sweep.rows, list_seeds(sweep, folder)):
        note = job_folder(folder, row, seed) / DIVERGED_FILE
        if (row.name, seed) in finished:
            continue
        if note.exists():
            notes.append(f"{row.name}, seed {seed}: {note.read_text().strip()}")
        elif seed in sweep.seeds:
            missing += 1
    if missing:
        notes.append(f"{missing} of {len(sweep.rows) * len(sweep.seeds)} runs are missing")

    # Without an empty line Markdown would add the notes to the table.
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _row_cells(name: str, runs: list[Result]) -> list[str]:
    def mean(field: str, digits: int = 1) -> str:
        return f"{sum(getattr(run, field) for run in runs) / len(runs):.{digits}f}"

    def each(field: str) -> str:
        return f"{mean(field)} ({', '.join(f'{getattr(run, field):.1f}' for run in runs)})"

    return [
        name,
        mean("validation"),
        each("linear"),
        each("knn"),
        f"{mean('untrained_linear')}, {mean('untrained_knn')}",
        f"{mean('pixels_linear')}, {mean('pixels_knn')}",
        mean("minutes"),
        mean("effective_rank", 0),
        ", ".join(str(run.seed) for run in runs),
    ]


def to_csv(results: list[Result]) -> str:
    """Formats one CSV row per run, in full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    return out.getvalue()
