"""Runs a sweep, one run after another, and writes its table and figure from the finished runs."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from jepax.commands import evaluation
from jepax.evals.progress import Progress
from jepax.sweeps import table
from jepax.sweeps.base import Sweep, Variant
from jepax.training import config as train_config
from jepax.training import loop as training
from jepax.training import monitor
from jepax.training.config import Config
from jepax.training.setup import make_setup
from jepax.types import UserError
from jepax.viz import figures
from jepax.viz.grid import plot_sweep

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep."""

    row: Variant
    config: Config
    folder: Path


@dataclass(frozen=True)
class SweepPlan:
    """The runs of one command."""

    grid: Sweep
    folder: Path
    jobs: list[SweepJob]
    """Runs of this command."""
    existing: list[SweepJob]
    """Runs that earlier commands left in the folder; the table shows them too."""


@contextlib.contextmanager
def with_variant_in_error(row: Variant) -> Iterator[None]:
    """Adds the row's name to a `UserError` raised within."""
    try:
        yield
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error


def run_sweep(plan: SweepPlan, say: LogFn) -> list[Path]:
    """Trains and evaluates the unfinished runs, and writes table and figure after every run.

    Baselines common to several runs are evaluated once and cached in the folder. A run that diverges is listed below
    the table and not repeated until its folder is removed. Invalid configs are refused before the first run.
    """
    # Refuse an invalid row now, not after hours of other rows.
    check_sweep(plan)

    for number, each in enumerate(plan.jobs, 1):
        if is_finished(each):
            continue
        say(f"run {number} of {len(plan.jobs)}: {each.row.name}, seed {each.config.seed}")
        try:
            run_job(each, plan.folder / "baselines", say)
        except monitor.DivergedError as error:
            # The note marks the run as finished, so that rerunning the command does not repeat it.
            say(f"{each.row.name}, seed {each.config.seed}: {error}")
            (each.folder / table.DIVERGED_FILE).write_text(str(error).splitlines()[0].rstrip(";") + "\n")

        # A sweep that is stopped later still has the table of all finished runs.
        write_results(plan.grid, plan.folder)
        clear_jit_caches()
    return write_results(plan.grid, plan.folder)


def check_sweep(plan: SweepPlan) -> None:
    """Raises `UserError` naming the row that cannot be trained, or whose folder contains a run of another config."""
    # One table compares runs of equal settings, those of earlier commands included.
    for each in plan.existing:
        with with_variant_in_error(each.row):
            check_same_settings(each)

    # The shapes of the state run every check of the config and allocate no parameters. One seed per row suffices.
    to_train = {each.row: each.config for each in plan.jobs if not is_finished(each)}
    for row, config in to_train.items():
        with with_variant_in_error(row):
            if not {"linear", "knn"} <= set(config.eval.protocols):
                raise UserError(
                    f"eval.protocols={config.eval.protocols} must hold linear and knn: the table shows both"
                )
            train_config.check_eval_splits(config.data)
            make_setup(config).abstract_state()


def check_same_settings(each: SweepJob) -> None:
    """Raises `UserError` if the run in the folder was trained or evaluated with another config."""
    free = [name for name in train_config.RESUMABLE_FIELDS if name != "eval"]
    if different := train_config.diff_from_run(each.folder, each.config, free):
        shown = "\n".join(different[:3])
        raise UserError(
            f"{each.folder} contains a run with a different config (saved -> requested):\n{shown}\n"
            "take another --run-dir"
        )


def clear_jit_caches() -> None:
    """Drops a run's compiled programs. Each uses memory maps, and a process is limited to 65,530 of them."""
    jax.clear_caches()
    gc.collect()


def run_job(each: SweepJob, baseline_cache: Path, say: LogFn) -> None:
    """Trains one run, draws its figures and evaluates it."""
    state = training.train(each.config, each.folder)
    figures.draw_figures(each.config, each.folder)
    evaluation.evaluate(evaluation.target_from_run(each.config, state, each.folder), Progress(say), baseline_cache)


def is_finished(each: SweepJob) -> bool:
    """True if the run was evaluated or diverged."""
    return (each.folder / table.DIVERGED_FILE).exists() or table.find_evaluation(each.folder) is not None


def write_results(grid: Sweep, folder: Path) -> list[Path]:
    """Writes grid.md, grid.csv and grid.png of the finished runs, of any seed, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = table.load_results(grid, folder)

    # Each file is written under another name and renamed, since another process may write its own at the same time.
    written = []
    for name, text in (("grid.md", table.to_markdown(grid, folder, found)), ("grid.csv", table.to_csv(found))):
        part = folder / f"{name}.{os.getpid()}.part"
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        written.append(part.replace(folder / name))

    # A figure needs at least one finished run.
    return [*written, figures.save_figure(plot_sweep(grid.name, found), folder / "grid.png")] if found else written
