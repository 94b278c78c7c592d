"""`jepax doctor`: a check of a run's folder."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jepax.commands.base import Command


@dataclass(frozen=True)
class Doctor(Command):
    """Check a run's folder: what it contains, what is valid, and what the next command would do.

    Changes nothing. The exit code is 1 if something is not valid.

    For example: jepax doctor runs/NAME
    """

    run_folder: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""

    def run(self) -> None:
        from jepax.training.inspect_run import inspect_run

        if not inspect_run(self.run_folder):
            sys.exit(1)
