"""`jepax pack`: a folder of photos as a few large files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jepax.commands.base import Command
from jepax.errors import UserError


@dataclass(frozen=True)
class Pack(Command):
    """Pack a folder of photos into a few large files, for data.dataset packed.

    The same command again resumes an interrupted packing.

    For example: jepax pack PHOTOS PACK --canvas-size 512
    """

    src: Annotated[Path, tyro.conf.arg(metavar="SRC")]
    """Folder with train/CLASS/* and val/CLASS/*."""
    dst: Annotated[Path, tyro.conf.arg(metavar="DST")]
    """Folder that is written."""
    canvas_size: int = 512
    """Longest side of a packed image in pixels; larger images are scaled down."""
    quality: int = 95
    """JPEG quality of images that were scaled down, in [1, 100]."""
    images_per_shard: int = 4096
    """Images in one file."""
    num_threads: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: one per core)")] = None
    """Files that are written at the same time."""
    bit_depth: int = 16
    """Bits of the values in 16-bit gray images, from 8 to 16."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality} is not in [1, 100]; try 95")
        if not 8 <= self.bit_depth <= 16:
            raise UserError(f"--bit-depth {self.bit_depth} is not in [8, 16]; try 12")
        for name in ("canvas_size", "images_per_shard", "num_threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")

    def run(self) -> None:
        from jepax.data import pack
        from jepax.distributed import multihost

        threads = self.num_threads or multihost.cores()
        config = pack.PackConfig(self.canvas_size, self.quality, self.images_per_shard, threads, self.bit_depth)
        pack.pack(self.src, self.dst, config)
