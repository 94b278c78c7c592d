"""`jepax doctor`: a check of a run's folder, or of a folder of photos."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jepax.commands.base import Command


@dataclass(frozen=True)
class Doctor(Command):
    """Check a run's folder: what it contains, what is valid, and what the next command would do.

    Of a folder of photos (train/CLASS, val/CLASS), list every file that cannot be read. Changes nothing. The exit code
    is 1 if something is not valid.

    For example: jepax doctor runs/NAME
    """

    folder: Annotated[Path, tyro.conf.arg(metavar="RUN|PHOTOS")]
    """Folder of a run, or of photos."""

    def run(self) -> None:
        from jepax.training.inspect_run import inspect_run

        is_data = (self.folder / "train").is_dir() and not (self.folder / "config.yaml").exists()
        if not (check_images if is_data else inspect_run)(self.folder):
            sys.exit(1)


def check_images(root: Path) -> bool:
    """Read every image; print those that cannot be read, and return True if there are none."""
    from jepax.data import DataConfig, open_source
    from jepax.data.corrupt import find_corrupt
    from jepax.distributed import multihost

    total, corrupt = 0, []
    for split in ("train", "test") if (root / "val").is_dir() else ("train",):
        source = open_source(DataConfig(dataset="image_folder", root=str(root), val_fraction=0.0), split)
        print(f"{split}: {source.describe()}")
        total += len(source)
        for name, why in find_corrupt(source, multihost.cores()):
            corrupt.append(name)
            print(f"{name} cannot be read: {why}")
    print(f"{len(corrupt)} of {total:,} images cannot be read" if corrupt else f"all {total:,} images can be read")
    return not corrupt
