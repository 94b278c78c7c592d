"""Reads images on the host: any source becomes batches of fixed shapes, ordered by seed and step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jepax.data.corrupt import CorruptLog, corrupt_file
from jepax.data.loader import OnCorrupt, batches, iter_once
from jepax.data.sources import ImageSource, Source, SplitName, fashion_mnist, image_folder, packed, synthetic
from jepax.data.sources.packed import PACK_FILE
from jepax.types import UserError

DatasetName = Literal["fashion_mnist", "image_folder", "packed", "synthetic"]


@dataclass(frozen=True)
class DataConfig:
    """Source of the images, and how they are read."""

    dataset: DatasetName = "fashion_mnist"
    """Kind of data: Fashion-MNIST, a folder of photos (train/CLASS/*.jpg, val/CLASS/*.jpg), a pack of one
    (`jepax pack`), or generated shapes."""
    root: str | None = None
    """Folder of the data. image_folder and packed need it; fashion_mnist also looks in system and cache."""
    canvas_size: int = 512
    """Side of the canvas in pixels; larger photos are scaled down onto it. fashion_mnist always has 28."""
    channels: Literal[1, 3] | None = None
    """1: gray, 3: RGB. None: the source's default, 1 for fashion_mnist and 3 for the others."""
    bit_depth: int = 16
    """Bits of the values in 16-bit gray images of an image_folder, from 8 to 16: 12 for many microscopes and scanners.
    The highest 8 are used."""
    val_fraction: float = 0.1
    """Fraction of each class's training images held out as the validation split; in [0, 1)."""
    max_corrupt_fraction: float = 0.01
    """Fraction of a split that may be corrupt (each image is replaced by another of its class) before the run stops; in
    [0, 1]."""
    synthetic_size: int = 512
    """Number of generated training images, held-out ones included; the test split has a fifth of it."""
    synthetic_seed: int = 0
    """Seed of the generated images."""
    synthetic_variable_size: bool = False
    """True: generated images differ in height and width (from half the canvas to all of it)."""
    num_threads: int = 2
    """Threads that read ahead, in each process; 0 reads in the caller's thread."""
    num_workers: int = 0
    """Worker processes; 0: threads only. A script that sets it needs an `if __name__ == "__main__":` guard."""

    def __post_init__(self):
        self._check("dataset", self.dataset in get_args(DatasetName), f"is none of {', '.join(get_args(DatasetName))}")
        self._check("channels", self.channels in (None, 1, 3), "is none of None, 1, 3")
        self._check("val_fraction", 0 <= self.val_fraction < 1, "is not a fraction in [0, 1); try 0.1")
        self._check(
            "max_corrupt_fraction", 0 <= self.max_corrupt_fraction <= 1, "is not a fraction in [0, 1]; try 0.01"
        )
        self._check("bit_depth", 8 <= self.bit_depth <= 16, "must be from 8 to 16")
        lowest = {"canvas_size": 1, "synthetic_size": 1, "synthetic_seed": 0, "num_threads": 0, "num_workers": 0}
        for name, least in lowest.items():
            self._check(name, getattr(self, name) >= least, f"must be at least {least}")

    def _check(self, name: str, valid: bool, problem: str) -> None:
        if not valid:
            raise UserError(f"data.{name}={getattr(self, name)} {problem}.")


def open_source(config: DataConfig, split: SplitName) -> ImageSource:
    """Opens one split. `validation` is held out of the training images; `test` is the data's own test set.

    Raises `UserError` if the data is missing, corrupt or in another layout.
    """
    root = None if config.root is None else Path(config.root).expanduser()
    if config.dataset == "fashion_mnist":
        return fashion_mnist.open_split(root, split, config.val_fraction, config.channels or 1)
    canvas_shape = (config.canvas_size, config.canvas_size, config.channels or 3)
    if config.dataset == "synthetic":
        return synthetic.open_split(
            split,
            images=config.synthetic_size,
            canvas_shape=canvas_shape,
            validation=config.val_fraction,
            seed=config.synthetic_seed,
            varied=config.synthetic_variable_size,
        )
    if root is None:
        needed = "train/ and val/" if config.dataset == "image_folder" else PACK_FILE
        raise UserError(f"data.root=None, but data.dataset={config.dataset} needs the folder that holds {needed}.")
    if config.dataset == "image_folder":
        return image_folder.open_split(root, split, config.val_fraction, canvas_shape, config.bit_depth)
    return packed.open_split(root, split, config.val_fraction, canvas_shape)


__all__ = [
    "CorruptLog",
    "DataConfig",
    "ImageSource",
    "OnCorrupt",
    "Source",
    "batches",
    "corrupt_file",
    "iter_once",
    "open_source",
]
