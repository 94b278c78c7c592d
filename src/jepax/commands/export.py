"""`jepax export`: an encoder leaves its run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jepax.commands.base import Command
from jepax.errors import UserError


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint's encoder as a Hugging Face I-JEPA folder, for transformers.

    For example: jepax export runs/NAME FOLDER
    """

    run_folder: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder that is written; it must not exist."""
    step: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """Step of another checkpoint than the newest."""
    encoder: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """target or context; by default the encoder that evaluations read."""

    def run(self) -> None:
        from jepax.export import weights
        from jepax.training import evaluation

        config = evaluation.load_run_config(self.run_folder)
        evaluation.check_image_method(config)
        state = evaluation.load_state(config, self.run_folder, self.step)
        encoders, step = state.method.encoders(), int(state.step)
        name = self.encoder or next(iter(encoders))
        if name not in encoders:
            raise UserError(f"--encoder {name}: {config.method.name} has no such encoder; it has {', '.join(encoders)}")
        weights.export(self.folder, encoders[name], config.method.crop, recipe=config.recipe, step=step, name=name)
        print(f"{self.folder}: the {name} encoder after step {step}")
        height, width = config.method.crop.size
        if height != width:
            print(f"its preprocessor only normalizes: resize and crop images to {height} x {width} yourself")
