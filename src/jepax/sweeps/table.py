"""A grid's results, read off its runs' folders: one line per run, and the table of rows."""

import csv
import io
import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from jepax.data import DataConfig, open_source
from jepax.io import config_yaml as configs
from jepax.io import logger
from jepax.sweeps.base import Sweep, Variant
from jepax.training.config import Config, compute_total_steps

DIVERGED_FILE = "diverged.txt"
"""In the folder of a run whose loss stopped being finite: why."""
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
    """One finished run: accuracies are top-1 in percent, on the test split but for `validation`."""

    row: str
    seed: int
    validation: float
    """Of the linear probe: what to choose by."""
    linear: float
    knn: float
    untrained_linear: float
    untrained_knn: float
    pixels_linear: float
    pixels_knn: float
    majority: float
    minutes: float
    """Of training, compilation included, without the evaluation."""
    effective_rank: float
    """Of the last layer's pooled features, on validation; collapse brings it near 1."""
    untrained_rank: float
    steps: int
    batch_size: int
    device: str


def job_folder(grid: Path, row: Variant, seed: int) -> Path:
    """The run of one row and seed."""
    return grid / f"{row.name}-seed{seed}"


def list_seeds(grid: Sweep, folder: Path) -> list[int]:
    """The grid's seeds, and those of any other run of it in the folder."""
    rows = {row.name for row in grid.rows}
    parts = [path.name.rpartition("-seed") for path in folder.glob("*-seed*")]
    return sorted({*grid.seeds, *(int(seed) for row, _, seed in parts if row in rows and seed.isdecimal())})


def load_results(grid: Sweep, folder: Path) -> list[Result]:
    """The grid's finished runs, by rows and seeds; what is not finished is left out."""
    runs = [(row, seed, job_folder(folder, row, seed)) for row in grid.rows for seed in list_seeds(grid, folder)]
    return [load_result(row, seed, run) for row, seed, run in runs if find_evaluation(run)]


def find_evaluation(run: Path) -> Path | None:
    """The evaluation of the run's last step, if there is one: `jepax evaluate` may have left one of an earlier step."""
    if not (run / "config.yaml").exists():
        return None
    config = configs.load(Config, run / "config.yaml")
    path = run / "evals" / f"step_{compute_total_steps(config, count_train_images(config.data)):08d}.json"
    return path if path.exists() else None


@lru_cache
def count_train_images(data: DataConfig) -> int:
    """Training pictures."""
    return len(open_source(data, "train"))


def load_result(row: Variant, seed: int, run: Path) -> Result:
    """The evaluation of a finished run, and what its log says of time."""
    found = json.loads(find_evaluation(run).read_text())
    rows = found["rows"]

    def both(name: str) -> list[float]:
        return [rows[name][kind]["top1"] for kind in ("linear", "knn")]

    lines = logger.read_metrics(run / logger.METRICS_FILE)
    return Result(
        row.name,
        seed,
        rows["trained"]["linear"]["best"]["validation_top1"],
        *both("trained"),
        *both("untrained"),
        *both("pixels"),
        majority=rows["majority"]["top1"],
        minutes=sum_seconds(lines) / 60,
        effective_rank=rows["trained"]["effective_rank"],
        untrained_rank=rows["untrained"]["effective_rank"],
        steps=found["step"],
        batch_size=configs.load(Config, run / "config.yaml").train.batch_size,
        device=found["versions"]["device"],
    )


def sum_seconds(lines: list[dict]) -> float:
    """Of all steps: each line holds the mean over those since the line before."""
    before = [-1, *(line["step"] for line in lines)]
    return sum((line["step"] - last) * line["perf/step_time"] for line, last in zip(lines, before, strict=False))


def to_markdown(grid: Sweep, folder: Path, found: list[Result]) -> str:
    """The table of rows: means over seeds, the scores of each seed behind them, in the seeds' order.

    Above it what is compared; below it the runs that diverged, and how many of the grid's are missing.
    """
    lines = [grid.about, ""] if grid.about else []
    lines += [f"| {' | '.join(TABLE_COLUMNS)} |", "|---" * len(TABLE_COLUMNS) + "|"]
    for row in grid.rows:
        runs = [result for result in found if result.row == row.name]
        if runs:
            lines.append(f"| {' | '.join(_row_cells(row.name, runs))} |")
    ended = {(run.row, run.seed) for run in found}
    others = [(row, seed) for row in grid.rows for seed in list_seeds(grid, folder) if (row.name, seed) not in ended]
    notes = {(row.name, seed): job_folder(folder, row, seed) / DIVERGED_FILE for row, seed in others}
    lost = [f"{row}, seed {seed}: {note.read_text().strip()}" for (row, seed), note in notes.items() if note.exists()]
    missing = sum(seed in grid.seeds and not note.exists() for (_, seed), note in notes.items())
    said = [f"{missing} of {len(grid.rows) * len(grid.seeds)} runs are missing"] if missing else []
    apart = [""] if lost or said else []  # else they would be rows
    return "\n".join([*lines, *apart, *lost, *said]) + "\n"


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


def to_csv(found: list[Result]) -> str:
    """Every run on a line of its own, in full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in found)
    return out.getvalue()
