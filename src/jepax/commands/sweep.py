"""`jepax sweep`: the rows of a sweep, each with every seed."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jepax.commands.base import ConfigCommand
from jepax.commands.parsing import Flags, split_words, to_field_path
from jepax.errors import UserError

if TYPE_CHECKING:  # jax takes seconds to import
    from jepax.sweeps.base import Sweep as SweepDefinition
    from jepax.sweeps.base import Variant
    from jepax.sweeps.run import SweepPlan
    from jepax.training.config import Config


@dataclass(frozen=True)
class Sweep(ConfigCommand):
    """Train and evaluate the rows of a sweep, or of a sweep's YAML file: one table, one figure.

    A field that is given, such as --train.epochs 1, is set in every row. The same command again continues the sweep.

    For example: jepax sweep family_fashion_mnist --seeds 0 1 2; jepax recipes lists the sweeps
    """

    sweep: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """A sweep, or a sweep's YAML file."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/NAME)")] = None
    """Folder of the sweep."""
    seeds: Annotated[tuple[int, ...] | None, tyro.conf.arg(help_behavior_hint="(default: the sweep's own)")] = None
    """Seeds of every row."""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """Run only every Nth run from the Ith on, such as 1/2 and 2/2 in two processes that share the folder."""

    def __post_init__(self) -> None:
        self.part()

    def part(self) -> slice:
        """`shard`: 2/3 is every third run from the second on."""
        number, _, count = (self.shard or "1/1").partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--shard {self.shard} is invalid: expected I/N with 1 <= I <= N, such as --shard 1/2")
        return slice(int(number) - 1, None, int(count))

    def plan(self) -> "SweepPlan":
        """The runs. Every config is built here, so that none fails after hours.

        Raises `UserError` naming the sweep, the row or the field, and the way out.
        """
        from jepax.sweeps import table
        from jepax.sweeps.run import SweepJob, SweepPlan

        check_overrides(self.overrides)
        sweep = load_sweep(self.sweep)
        if self.seeds is not None:
            sweep = replace(sweep, seeds=self.seeds)
        folder = self.run_dir or Path("runs") / sweep.name
        shared = [*plain_overrides(sweep.shared), *self.overrides]
        configs = [(row, config_of_row(row, shared, also=list(self.options()))) for row in sweep.rows]

        def jobs_of(seeds: Iterable[int]) -> list[SweepJob]:
            runs = [(row, seed, replace(config, seed=seed)) for seed in seeds for row, config in configs]
            return [SweepJob(row, config, table.job_folder(folder, row, seed)) for row, seed, config in runs]

        # The table also shows what earlier commands, of whatever seeds, left in the folder.
        existing = [job for job in jobs_of(table.list_seeds(sweep, folder)) if (job.folder / "config.yaml").exists()]
        return SweepPlan(sweep, folder, jobs_of(sweep.seeds)[self.part()], existing)

    def run(self) -> None:
        from jepax.sweeps.run import run_sweep

        written = run_sweep(self.plan(), print=lambda line: print(line, file=sys.stderr))
        print(written[0].read_text(encoding="utf-8"), end="")
        print(*written, sep="\n")


def load_sweep(name: str) -> "SweepDefinition":
    """The sweep of that name, or the sweep in that file."""
    from jepax.io import config_yaml
    from jepax.sweeps.base import SWEEPS, Sweep

    if name in SWEEPS:
        return SWEEPS[name]()
    if Path(name).suffix in (".yaml", ".yml"):
        return config_yaml.load(Sweep, Path(name))
    raise UserError(f"{name!r} is neither a sweep nor a sweep's file; {config_yaml.suggest(name, SWEEPS)}")


def check_overrides(groups: Flags) -> None:
    """Raise `UserError` at flags that a sweep would ignore."""
    ways_out = {
        "seed": "a sweep takes --seeds 0 1 2",
        "dry_run": "a sweep has no --dry-run: jepax train has",
        "run_dir": "--run-dir belongs to the command line: jepax sweep NAME --run-dir DIR",
    }
    for flag, *_ in groups:
        if to_field_path(flag) in ways_out:
            raise UserError(ways_out[to_field_path(flag)])


def plain_overrides(words: tuple[str, ...]) -> list[list[str]]:
    """The overrides of a sweep's file, or of a row."""
    values, groups = split_words(words)
    if values:
        raise UserError(f"unexpected {values[0]!r}: expected --FIELD.PATH VALUE ...")
    check_overrides(groups)
    return groups


def config_of_row(row: "Variant", shared: Flags, also: Sequence[str]) -> "Config":
    """The config of a row. Raises `UserError` if all rows are given what this one varies."""
    from jepax.commands import overrides
    from jepax.sweeps.run import with_variant_in_error

    varied = plain_overrides(row.overrides)
    if both := {to_field_path(flag) for flag, *_ in varied} & {to_field_path(flag) for flag, *_ in shared}:
        raise UserError(f"row {row.name} varies {min(both)}, so it cannot be given to every row")
    with with_variant_in_error(row):
        return overrides.override(overrides.load_base(row.recipe), [*shared, *varied], also)
