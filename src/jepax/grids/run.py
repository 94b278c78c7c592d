"""The runs of a grid one after the other, and its table and figure from whatever is finished."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax

from jepax import evaluation, monitor, settings
from jepax import train as training
from jepax.evals.say import Say as Teller
from jepax.grids import table
from jepax.grids.base import Grid, Row
from jepax.settings import Config
from jepax.step import first_state
from jepax.types import UserError
from jepax.viz import figures
from jepax.viz.grid import chart

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    row: Row
    config: Config
    folder: Path


@dataclass(frozen=True)
class SweepPlan:
    """What one command runs."""

    grid: Grid
    folder: Path
    jobs: list[Job]
    """What this command runs."""
    existing: list[Job]
    """What earlier commands left in the folder: the table shows it, too."""


@contextlib.contextmanager
def blamed(row: Row) -> Iterator[None]:
    """Within, a `UserError` names the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error


def run(plan: SweepPlan, say: Say) -> list[Path]:
    """Trains and evaluates what is not finished yet, and writes table and figure after every run.

    Floors that are the same in several runs are measured once, and kept in the folder. A run that diverges is told in
    the table and not tried again until its folder is removed. What cannot be trained is refused before the first run.
    """
    check(plan)
    for number, each in enumerate(plan.jobs, 1):
        if settled(each):
            continue
        say(f"run {number} of {len(plan.jobs)}: {each.row.name}, seed {each.config.seed}")
        try:
            one(each, plan.folder / "floors", say)
        except monitor.Diverged as error:
            say(f"{each.row.name}, seed {each.config.seed}: {error}")
            (each.folder / table.DIVERGED).write_text(str(error).splitlines()[0].rstrip(";") + "\n")
        write(plan.grid, plan.folder)
        forget_programs()
    return write(plan.grid, plan.folder)


def check(plan: SweepPlan) -> None:
    """Raises `UserError` naming the row that cannot be trained, or whose folder holds a run of another config."""
    for each in plan.existing:
        with blamed(each.row):
            refuse_other_settings(each)
    to_train = {each.row: each.config for each in plan.jobs if not settled(each)}
    for row, config in to_train.items():
        with blamed(row):
            if not {"linear", "knn"} <= set(config.eval.protocols):
                raise UserError(
                    f"eval.protocols={config.eval.protocols} must hold linear and knn: the table shows both"
                )
            settings.check_splits(config.data)
            _, optimizer = settings.prepare(config)
            eqx.filter_eval_shape(first_state, config.method, optimizer, jax.random.key(0))


def refuse_other_settings(each: Job) -> None:
    """Raises `UserError` where the row's folder was trained or evaluated otherwise: one table holds one kind."""
    free = [name for name in settings.FREE if name != "eval"]
    if different := settings.differences(each.folder, each.config, free):
        shown = "\n".join(different[:3])
        raise UserError(
            f"{each.folder} contains a run with a different config (saved -> requested):\n{shown}\n"
            "take another --run-dir"
        )


def forget_programs() -> None:
    """Drops a run's programs: each holds maps of memory, of which a process may have 65,530; no other run needs it."""
    jax.clear_caches()
    gc.collect()


def one(each: Job, floors: Path, say: Say) -> None:
    """Trains, draws and evaluates one run."""
    state = training.train(each.config, each.folder)
    figures.draw(each.config, each.folder)
    evaluation.evaluate(evaluation.of_run(each.config, state, each.folder), Teller(say), floors)


def settled(each: Job) -> bool:
    """Whether the run ended, with an evaluation or without."""
    return (each.folder / table.DIVERGED).exists() or table.evaluation(each.folder) is not None


def write(grid: Grid, folder: Path) -> list[Path]:
    """grid.md, grid.csv and grid.png of the runs that are finished, of whatever seeds, and their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = table.results(grid, folder)
    written = []
    for name, text in (("grid.md", table.markdown(grid, folder, found)), ("grid.csv", table.comma_separated(found))):
        part = folder / f"{name}.{os.getpid()}.part"  # another process may write its own at the same time
        part.write_text(text)
        written.append(part.replace(folder / name))
    return [*written, figures.save(chart(grid.name, found), folder / "grid.png")] if found else written
