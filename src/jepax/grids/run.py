"""`jepax grid`: the runs of a grid one after the other, and its table and figure from whatever is finished."""

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax

from jepax import config as configs
from jepax import evaluation, monitor, overrides, settings
from jepax import train as training
from jepax.evals.say import Say as Teller
from jepax.grids import table
from jepax.grids.base import GRIDS, Grid, Row
from jepax.settings import Config
from jepax.step import first_state
from jepax.types import UserError
from jepax.viz import figures
from jepax.viz.grid import chart

Say = Callable[[str], None]
OWN = ("run_dir", "seeds", "part")
"""The grid's own flags."""


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    row: Row
    config: Config
    folder: Path


@dataclass(frozen=True)
class Wanted:
    """What `jepax grid` was asked for."""

    grid: Grid
    folder: Path
    jobs: list[Job]
    """What this command runs."""
    kept: list[Job]
    """What lies in the folder of earlier commands: the table holds it too."""


def resolve(arguments: list[str]) -> Wanted:
    """Reads the arguments of `jepax grid`. Every run's config is resolved, so that none fails after hours.

    Raises `UserError` naming the grid, the row or the field, and the way out.
    """
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"give the grid, or a grid's file, first: jepax grid NAME\ngrids: {', '.join(sorted(GRIDS))}")
    own, shared = sorted_out(overrides.grouped(arguments[1:]))
    grid = begin(arguments[0])
    if "seeds" in own:
        grid = dataclasses.replace(grid, seeds=tuple(whole(word, "--seeds 0 1 2") for word in own["seeds"]))
    if len(own.get("run_dir", [""])) != 1:
        raise UserError("--run-dir takes one folder: --run-dir runs/NAME")
    folder = Path(own["run_dir"][0]) if "run_dir" in own else Path("runs") / grid.name
    rows = [(row, config_of(row, [*plain_overrides(grid.shared), *shared])) for row in grid.rows]

    def jobs_of(seeds: Iterable[int]) -> list[Job]:
        runs = [(row, dataclasses.replace(config, seed=seed)) for seed in seeds for row, config in rows]
        return [Job(row, config, table.folder_of(folder, row, config.seed)) for row, config in runs]

    jobs = jobs_of(grid.seeds)
    kept = [each for each in jobs_of(table.seeds_of(grid, folder)) if (each.folder / "config.yaml").exists()]
    return Wanted(grid, folder, jobs[part_of(own["part"])] if "part" in own else jobs, kept)


def sorted_out(groups: list[list[str]]) -> tuple[dict[str, list[str]], list[list[str]]]:
    """The grid's own flags by name, and the overrides of every row. Raises `UserError` at what would be ignored."""
    own, shared = {}, []
    for flag, *words in groups:
        name = overrides.dotted(flag)
        if name in ("seed", "dry_run"):
            way = {"seed": "a grid takes --seeds 0 1 2", "dry_run": "a grid has no --dry-run: jepax train has"}
            raise UserError(way[name])
        if "." not in name and name not in OWN and (near := configs.closest(name, OWN)):
            raise UserError(f"{flag} is no field; did you mean --{near.replace('_', '-')}?")
        if name not in OWN:
            shared.append([flag, *words])
        elif name in own:
            raise UserError(f"{flag} stands there twice; remove one")
        else:
            own[name] = words
    return own, shared


def plain_overrides(words: tuple[str, ...]) -> list[list[str]]:
    """A grid's or a row's overrides. Raises `UserError` at what belongs to the command line."""
    own, groups = sorted_out(overrides.grouped(list(words)))
    if own:
        raise UserError(f"--{min(own).replace('_', '-')} belongs to the command line: jepax grid NAME")
    return groups


def begin(name: str) -> Grid:
    """The grid of that name, or the grid in that file."""
    if name in GRIDS:
        return GRIDS[name]()
    if Path(name).suffix in (".yaml", ".yml"):
        return configs.load(Grid, Path(name))
    raise UserError(f"{name!r} is neither a grid nor a grid's file; {configs.nearest(name, GRIDS)}")


def whole(word: str, example: str) -> int:
    """Raises `UserError` where the word is no whole number."""
    if not word.isdecimal():
        raise UserError(f"{word!r} is no number that is whole and not negative; write {example}")
    return int(word)


def part_of(words: list[str]) -> slice:
    """`2/3` as every third run from the second on."""
    number, _, count = " ".join(words).partition("/")
    first, every = (whole(word, "--part 1/2") for word in (number, count))
    if not 1 <= first <= every:
        raise UserError(f"--part {' '.join(words)} is no part of the runs; write --part 1/2 and --part 2/2")
    return slice(first - 1, None, every)


def config_of(row: Row, shared: list[list[str]]) -> Config:
    """What a row's runs share. Raises `UserError` where all rows are given what this one varies."""
    varied = plain_overrides(row.overrides)
    if both := {overrides.dotted(words[0]) for words in varied} & {overrides.dotted(words[0]) for words in shared}:
        raise UserError(f"row {row.name} varies {min(both)}, so it cannot be given to every row")
    with blamed(row):
        return overrides.override(overrides.begin(row.recipe), [*shared, *varied])


@contextlib.contextmanager
def blamed(row: Row) -> Iterator[None]:
    """Within, a `UserError` names the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error


def run(wanted: Wanted, say: Say) -> list[Path]:
    """Trains and evaluates what is not finished yet, and writes table and figure after every run.

    Floors that are the same in several runs are measured once, and kept in the folder. A run that diverges is told in
    the table and not tried again until its folder is removed. What cannot be trained is refused before the first run.
    """
    check(wanted)
    for number, each in enumerate(wanted.jobs, 1):
        if settled(each):
            continue
        say(f"run {number} of {len(wanted.jobs)}: {each.row.name}, seed {each.config.seed}")
        try:
            one(each, wanted.folder / "floors", say)
        except monitor.Diverged as error:
            say(f"{each.row.name}, seed {each.config.seed}: {error}")
            (each.folder / table.DIVERGED).write_text(str(error).splitlines()[0].rstrip(";") + "\n")
        write(wanted.grid, wanted.folder)
        forget_programs()
    return write(wanted.grid, wanted.folder)


def check(wanted: Wanted) -> None:
    """Raises `UserError` naming the row that cannot be trained, or whose folder holds a run of another config."""
    for each in wanted.kept:
        with blamed(each.row):
            refuse_other_settings(each)
    to_train = {each.row: each.config for each in wanted.jobs if not settled(each)}
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
            f"{each.folder} holds a run of another config (there -> here):\n{shown}\ntake another --run-dir"
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
