"""`jepax replay`: the step that ended a run, again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jepax.commands.base import Command


@dataclass(frozen=True)
class Replay(Command):
    """Repeat the step that ended a run, from its dump, and name what is not finite.

    For example: jepax replay runs/NAME/dumps/step_N
    """

    dump: Annotated[Path, tyro.conf.arg(metavar="DUMP")]
    """Folder of the dump, in runs/NAME/dumps."""

    def run(self) -> None:
        from jepax.training.nan_dump import replay

        replay(self.dump)
