"""`jepax bench`: the speed of a recipe's step."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jepax.commands.base import RecipeCommand
from jepax.errors import UserError


@dataclass(frozen=True)
class BenchOptions(RecipeCommand):
    """What both benchmarks take."""

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

    baseline: Literal["torch"] | None = None
    """Also time plain PyTorch's I-JEPA at the same shapes, eager and compiled."""

    def run(self) -> None:
        if self.baseline is not None:  # both share an accelerator's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from jepax.bench import run

        run.run_bench(self.config(), self.repeats, json=self.json, against_torch=self.baseline is not None)
