"""`jepax grid`: the runs of a grid one after the other, and its table and figure from whatever is finished."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jepax import config as configs
from jepax import overrides
from jepax import train as training
from jepax.data import open_source
from jepax.grids import table
from jepax.grids.base import GRIDS, Grid, Row
from jepax.train import Config
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
class Wanted:
    """What `jepax grid` was asked for."""

    grid: Grid
    folder: Path
    jobs: list[Job]


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
    shared = [*overrides.grouped(list(grid.shared)), *shared]
    jobs = [job(row, seed, shared, folder) for seed in grid.seeds for row in grid.rows]
    return Wanted(grid, folder, jobs[part_of(own["part"])] if "part" in own else jobs)


def sorted_out(groups: list[list[str]]) -> tuple[dict[str, list[str]], list[list[str]]]:
    """The grid's own flags by name, and the overrides of every row. Raises `UserError` at what would be ignored."""
    own, shared = {}, []
    for flag, *words in groups:
        name = overrides.dotted(flag)
        if name in ("seed", "dry_run"):
            way = {"seed": "a grid takes --seeds 0 1 2", "dry_run": "a grid has no --dry-run: jepax train has"}
            raise UserError(way[name])
        if name not in ("run_dir", "seeds", "part"):
            shared.append([flag, *words])
        elif name in own:
            raise UserError(f"{flag} stands there twice; remove one")
        else:
            own[name] = words
    return own, shared


def begin(name: str) -> Grid:
    """The grid of that name, or the grid in that file."""
    if name in GRIDS:
        return GRIDS[name]()
    if Path(name).suffix in (".yaml", ".yml"):
        return configs.load(Grid, Path(name))
    raise UserError(f"{name!r} is neither a grid nor a grid's file; {configs.nearest(name, GRIDS)}")


def whole(word: str, example: str) -> int:
    """Raises `UserError` where the word is no whole number."""
    if not word.lstrip("-").isdecimal():
        raise UserError(f"{word!r} is no whole number; write {example}")
    return int(word)


def part_of(words: list[str]) -> slice:
    """`2/3` as every third run from the second on."""
    number, _, count = "".join(words).partition("/")
    first, every = (whole(word, "--part 1/2") for word in (number, count))
    if not 1 <= first <= every:
        raise UserError(f"--part {''.join(words)} is no part of the runs; write --part 1/2 and --part 2/2")
    return slice(first - 1, None, every)


def job(row: Row, seed: int, shared: list[list[str]], folder: Path) -> Job:
    """The run of one row with one seed. Raises `UserError` where all rows are given what this one varies."""
    varied = overrides.grouped(list(row.overrides))
    if both := {overrides.dotted(words[0]) for words in varied} & {overrides.dotted(words[0]) for words in shared}:
        raise UserError(f"row {row.name} varies {min(both)}, so it cannot be given to every row")
    groups = [*shared, *varied, ["--seed", str(seed)]]
    try:
        config = overrides.override(overrides.begin(row.recipe), groups)
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error
    return Job(row, config, table.folder_of(folder, row, seed))


def run(wanted: Wanted, say: Say) -> list[Path]:
    """Trains and evaluates what is not finished yet, and writes table and figure after every run.

    Floors that are the same in several runs are measured once, and kept in the folder. A run that diverges is told in
    the table and not tried again until its folder is removed.
    """
    for number, each in enumerate(wanted.jobs, 1):
        if settled(each):
            continue
        say(f"run {number} of {len(wanted.jobs)}: {each.row.name}, seed {each.config.seed}")
        try:
            one(each, wanted.folder / "floors", say)
        except training.Diverged as error:
            say(f"{each.row.name}, seed {each.config.seed}: {error}")
            (each.folder / table.DIVERGED).write_text(str(error).splitlines()[0] + "\n")
        write(wanted.grid, wanted.folder)
    return write(wanted.grid, wanted.folder)


def one(each: Job, floors: Path, say: Say) -> None:
    """Trains, draws and evaluates one run."""
    for split in ("validation", "test"):  # what evaluation will need is missed now, not after the last step
        open_source(each.config.data, split)
    state = training.train(each.config, each.folder)
    figures.draw(each.config, each.folder)
    training.evaluate(each.config, state, each.folder, say, floors=floors)


def settled(each: Job) -> bool:
    """Whether the run ended. Raises `UserError` where its folder holds a run of another config."""
    if not (each.folder / "config.yaml").exists():
        return False
    training.claim(each.folder, each.config)
    return (each.folder / table.DIVERGED).exists() or table.evaluation(each.folder) is not None


def write(grid: Grid, folder: Path) -> list[Path]:
    """grid.md, grid.csv and grid.png of the runs that are finished, of whatever seeds, and their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = table.results(grid, folder)
    written = []
    for name, text in (("grid.md", table.markdown(grid, folder)), ("grid.csv", table.comma_separated(found))):
        part = folder / f"{name}.{os.getpid()}.part"  # another process may write its own at the same time
        part.write_text(text)
        written.append(part.replace(folder / name))
    return [*written, figures.save(chart(grid.name, found), folder / "grid.png")] if found else written
