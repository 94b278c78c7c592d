"""`jepax bench` and `jepax bench-data`: the speed of a recipe's step, and of reading its images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jepax.commands.base import RecipeCommand
from jepax.errors import UserError


@dataclass(frozen=True)
class BenchOptions(RecipeCommand):
    """Options of both benchmarks."""

    repeats: int = 20
    """Timed steps."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the numbers."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats} must be at least 1; try 20")


@dataclass(frozen=True)
class Bench(BenchOptions):
    """Time a recipe's step on this machine, by part, and against the machine's peak.

    For example: jepax bench ijepa_fashion_mnist
    """

    def run(self) -> None:
        from jepax.bench.run import measure_step, publish, step_rows

        found = measure_step(self.config(), self.repeats)
        publish(found, step_rows(found), self.json)


@dataclass(frozen=True)
class BenchData(BenchOptions):
    """Time reading images, per core and against Pillow, and compare with what the recipe's step needs.

    For example: jepax bench-data byol_vits16_in100 --data.root PHOTOS
    """

    def run(self) -> None:
        from jepax.bench.input_bench import input_rows, measure_input
        from jepax.bench.run import publish

        found = measure_input(self.config(), self.repeats)
        publish(found, input_rows(found), self.json)
