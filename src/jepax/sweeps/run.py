"""Runs a sweep, one run after another, and writes its table and figure from the finished runs."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from jepax.evals.progress import Progress
from jepax.sweeps import table
from jepax.sweeps.base import Sweep, Variant
from jepax.sweeps.figure import plot_sweep
from jepax.training import config as train_config
from jepax.training import evaluation, monitor
from jepax.training import loop as training
from jepax.training.config import Config
from jepax.training.dry_run import LogFn
from jepax.training.setup import make_setup
from jepax.types import UserError
from jepax.viz import figures


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep."""

    row: Variant
    config: Config
    folder: Path

    def is_finished(self) -> bool:
        """True if the run was evaluated or diverged."""
        return (self.folder / table.DIVERGED_FILE).exists() or table.find_evaluation(self.folder) is not None


@dataclass(frozen=True)
class SweepPlan:
    """The runs of one command."""

    sweep: Sweep
    folder: Path
    jobs: list[SweepJob]
    """Runs of this command."""
    existing: list[SweepJob]
    """Runs that earlier commands left in the folder; the table shows them too."""


def run_sweep(plan: SweepPlan, print: LogFn) -> list[Path]:
    """Trains and evaluates the unfinished runs, writes table and figure after every run, and returns their paths.

    Baselines common to several runs are evaluated once and cached in the folder. A run that diverges is listed below
    the table and not repeated until its folder is removed. Invalid configs are refused before the first run.
    """
    # Refuse an invalid row now, not after hours of other rows.
    check_sweep(plan)

    for number, job in enumerate(plan.jobs, 1):
        if job.is_finished():
            continue
        print(f"run {number} of {len(plan.jobs)}: {job.row.name}, seed {job.config.seed}")
        try:
            run_job(job, plan.folder / "baselines", print)
        except monitor.DivergedError as error:
            # The note marks the run as finished, so that rerunning the command does not repeat it.
            print(f"{job.row.name}, seed {job.config.seed}: {error}")
            (job.folder / table.DIVERGED_FILE).write_text(str(error).splitlines()[0].rstrip(";") + "\n")

        # A sweep that is stopped later still has the table of all finished runs.
        write_results(plan.sweep, plan.folder)
        clear_jit_caches()
    return write_results(plan.sweep, plan.folder)


def run_job(job: SweepJob, baseline_cache: Path, print: LogFn) -> None:
    """Trains one run, draws its figures and evaluates it."""
    state = training.train(job.config, job.folder)
    figures.draw_figures(job.config, job.folder)
    evaluation.evaluate(evaluation.target_from_run(job.config, state, job.folder), Progress(print), baseline_cache)


def write_results(sweep: Sweep, folder: Path) -> list[Path]:
    """Writes grid.md, grid.csv and grid.png of the finished runs, of any seed, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results = table.load_results(sweep, folder)

    # Each file is written under another name and renamed, since another process may write its own at the same time.
    written = []
    texts = {"grid.md": table.to_markdown(sweep, folder, results), "grid.csv": table.to_csv(results)}
    for name, text in texts.items():
        part = folder / f"{name}.{os.getpid()}.part"
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        written.append(part.replace(folder / name))
    if results:
        written.append(figures.save_figure(plot_sweep(sweep.name, results), folder / "grid.png"))
    return written


def clear_jit_caches() -> None:
    """Drops a run's compiled programs. Each uses memory maps, and a process is limited to 65,530 of them."""
    jax.clear_caches()
    gc.collect()


def check_sweep(plan: SweepPlan) -> None:
    """Raises `UserError` naming the row that cannot be trained, or whose folder contains a run of another config."""
    # One table compares runs of equal settings, those of earlier commands included.
    may_differ = [name for name in train_config.RESUMABLE_FIELDS if name != "eval"]
    for job in plan.existing:
        with with_variant_in_error(job.row):
            if different := train_config.diff_from_run(job.folder, job.config, may_differ):
                shown = "\n".join([*different[:3], "take another --run-dir"])
                raise UserError(f"{job.folder} contains a run with a different config (saved -> requested):\n{shown}")

    # The shapes of the state run every check of the config and allocate no parameters. One seed per row suffices.
    to_train = {job.row: job.config for job in plan.jobs if not job.is_finished()}
    for row, config in to_train.items():
        with with_variant_in_error(row):
            if not {"linear", "knn"} <= set(config.eval.protocols):
                raise UserError(
                    f"eval.protocols={config.eval.protocols} must contain linear and knn, the table's columns"
                )
            evaluation.check_image_method(config)
            train_config.check_eval_splits(config.data)
            make_setup(config).abstract_state()


@contextlib.contextmanager
def with_variant_in_error(row: Variant) -> Iterator[None]:
    """Adds the row's name to a `UserError` raised within."""
    try:
        yield
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error
