"""The runs of a grid one after the other, and its table and figure from whatever is finished."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from jepax.commands import evaluation
from jepax.evals.progress import ProgressReporter as Teller
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
    """One run of a grid."""

    row: Variant
    config: Config
    folder: Path


@dataclass(frozen=True)
class SweepPlan:
    """What one command runs."""

    grid: Sweep
    folder: Path
    jobs: list[SweepJob]
    """What this command runs."""
    existing: list[SweepJob]
    """What earlier commands left in the folder: the table shows it, too."""


@contextlib.contextmanager
def with_variant_in_error(row: Variant) -> Iterator[None]:
    """Within, a `UserError` names the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error


def run_sweep(plan: SweepPlan, say: LogFn) -> list[Path]:
    """Trains and evaluates what is not finished yet, and writes table and figure after every run.

    Floors that are the same in several runs are measured once, and kept in the folder. A run that diverges is told in
    the table and not tried again until its folder is removed. What cannot be trained is refused before the first run.
    """
    check_sweep(plan)
    for number, each in enumerate(plan.jobs, 1):
        if is_finished(each):
            continue
        say(f"run {number} of {len(plan.jobs)}: {each.row.name}, seed {each.config.seed}")
        try:
            run_job(each, plan.folder / "floors", say)
        except monitor.DivergedError as error:
            say(f"{each.row.name}, seed {each.config.seed}: {error}")
            (each.folder / table.DIVERGED_FILE).write_text(str(error).splitlines()[0].rstrip(";") + "\n")
        write_results(plan.grid, plan.folder)
        clear_jit_caches()
    return write_results(plan.grid, plan.folder)


def check_sweep(plan: SweepPlan) -> None:
    """Raises `UserError` naming the row that cannot be trained, or whose folder holds a run of another config."""
    for each in plan.existing:
        with with_variant_in_error(each.row):
            check_same_settings(each)
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
    """Raises `UserError` where the row's folder was trained or evaluated otherwise: one table holds one kind."""
    free = [name for name in train_config.RESUMABLE_FIELDS if name != "eval"]
    if different := train_config.diff_from_run(each.folder, each.config, free):
        shown = "\n".join(different[:3])
        raise UserError(
            f"{each.folder} contains a run with a different config (saved -> requested):\n{shown}\n"
            "take another --run-dir"
        )


def clear_jit_caches() -> None:
    """Drops a run's programs: each holds maps of memory, of which a process may have 65,530; no other run needs it."""
    jax.clear_caches()
    gc.collect()


def run_job(each: SweepJob, floors: Path, say: LogFn) -> None:
    """Trains, draws and evaluates one run."""
    state = training.train(each.config, each.folder)
    figures.draw_figures(each.config, each.folder)
    evaluation.evaluate(evaluation.target_from_run(each.config, state, each.folder), Teller(say), floors)


def is_finished(each: SweepJob) -> bool:
    """Whether the run ended, with an evaluation or without."""
    return (each.folder / table.DIVERGED_FILE).exists() or table.find_evaluation(each.folder) is not None


def write_results(grid: Sweep, folder: Path) -> list[Path]:
    """grid.md, grid.csv and grid.png of the runs that are finished, of whatever seeds, and their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = table.load_results(grid, folder)
    written = []
    for name, text in (("grid.md", table.to_markdown(grid, folder, found)), ("grid.csv", table.to_csv(found))):
        part = folder / f"{name}.{os.getpid()}.part"  # another process may write its own at the same time
        part.write_text(text)
        written.append(part.replace(folder / name))
    return [*written, figures.save_figure(plot_sweep(grid.name, found), folder / "grid.png")] if found else written
