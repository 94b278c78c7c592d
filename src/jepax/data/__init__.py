"""Reads images and clips on the host: any source becomes batches of fixed shapes, ordered by seed and step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jepax.data.corrupt import CorruptLog, corrupt_file
from jepax.data.episodes import EPISODES_FILE
from jepax.data.loader import OnCorrupt, batches, iter_once
from jepax.data.sources import ImageSource, Source, SplitName, clips, fashion_mnist, image_folder, packed, synthetic
from jepax.data.sources.clips import ClipSource
from jepax.data.sources.packed import PACK_FILE
from jepax.types import UserError

DatasetName = Literal["fashion_mnist", "image_folder", "packed", "synthetic", "two_room", "episodes"]
CLIP_DATASETS = ("two_room", "episodes")
"""Datasets of clips with actions; the others have labeled images."""


@dataclass(frozen=True)
class DataConfig:
    """Source of the images or clips, and how they are read."""

    dataset: DatasetName = "fashion_mnist"
    """Kind of data: Fashion-MNIST, a folder of photos (train/CLASS/*.jpg, val/CLASS/*.jpg), a pack of one
    (`jepax pack`), or generated shapes; or clips of episodes, of Two-Room, simulated when the data is opened, or of a
    folder (`jepax collect`)."""
    root: str | None = None
    """Folder of the data. image_folder, packed and episodes need it; fashion_mnist also looks in system and cache."""
    canvas_size: int = 512
    """Side of the canvas in pixels; larger photos are scaled down onto it. fashion_mnist always has 28, episodes the
    size of their frames; two_room draws 32 or 224."""
    channels: Literal[1, 3] | None = None
    """1: gray, 3: RGB. None: the source's default, 1 for fashion_mnist and 3 for the others. Clips have their own."""
    bit_depth: int = 16
    """Bits of the values in 16-bit gray images of an image_folder, from 8 to 16: 12 for many microscopes and scanners.
    The highest 8 are used."""
    val_fraction: float = 0.1
    """Fraction of each class's training images, or of the episodes, held out as the validation split; in [0, 1)."""
    max_corrupt_fraction: float = 0.01
    """Fraction of a split that may be corrupt (each image is replaced by another of its class) before the run stops; in
    [0, 1]."""
    synthetic_size: int = 512
    """Number of generated training images, held-out ones included; the test split has a fifth of it."""
    synthetic_seed: int = 0
    """Seed of the generated images or simulated episodes."""
    synthetic_variable_size: bool = False
    """True: generated images differ in height and width (from half the canvas to all of it)."""
    num_episodes: int = 2000
    """Number of simulated training episodes, held-out ones included; the test split has a fifth of it."""
    clip_frames: int = 4
    """Frames of a clip."""
    frame_skip: int = 5
    """Steps of an episode between two frames of a clip; the actions of these steps are one block."""
    num_threads: int = 2
    """Threads that read ahead, in each process; 0 reads in the caller's thread."""
    num_workers: int = 0
    """Worker processes; 0: threads only. A script that sets it needs an `if __name__ == "__main__":` guard."""

    def __post_init__(self):
        self._check("dataset", self.dataset in get_args(DatasetName), f"is none of {', '.join(get_args(DatasetName))}")
        self._check("channels", self.channels in (None, 1, 3), "is none of None, 1, 3")
        is_image = self.dataset not in CLIP_DATASETS
        self._check(
            "channels", is_image or self.channels is None, f"is for images; {self.dataset} has its own: set None"
        )
        self._check("val_fraction", 0 <= self.val_fraction < 1, "is not a fraction in [0, 1); try 0.1")
        self._check(
            "max_corrupt_fraction", 0 <= self.max_corrupt_fraction <= 1, "is not a fraction in [0, 1]; try 0.01"
        )
        self._check("bit_depth", 8 <= self.bit_depth <= 16, "must be from 8 to 16")
        for name in ("canvas_size", "synthetic_size", "num_episodes", "clip_frames", "frame_skip"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("synthetic_seed", "num_threads", "num_workers"):
            self._check(name, getattr(self, name) >= 0, "must be at least 0")

    def _check(self, name: str, valid: bool, problem: str) -> None:
        if not valid:
            raise UserError(f"data.{name}={getattr(self, name)} {problem}.")


def open_source(config: DataConfig, split: SplitName) -> Source:
    """Opens one split: an `ImageSource`, or a `ClipSource` for the datasets in `CLIP_DATASETS`.

    `validation` is held out of the training images or episodes; `test` is the data's own test set, which a folder of
    episodes does not have. Raises `UserError` if the data is missing, corrupt or in another layout.
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
    clip = {"clip_frames": config.clip_frames, "frame_skip": config.frame_skip, "val_fraction": config.val_fraction}
    if config.dataset == "two_room":
        return clips.open_simulated(
            split,
            environment=config.dataset,
            image_size=config.canvas_size,
            episodes=config.num_episodes,
            seed=config.synthetic_seed,
            **clip,
        )
    if root is None:
        needed = {"image_folder": "train/ and val/", "packed": PACK_FILE}.get(config.dataset, EPISODES_FILE)
        raise UserError(f"data.root=None, but data.dataset={config.dataset} needs the folder that holds {needed}.")
    if config.dataset == "episodes":
        return clips.open_folder(root, split, **clip)
    if config.dataset == "image_folder":
        return image_folder.open_split(root, split, config.val_fraction, canvas_shape, config.bit_depth)
    return packed.open_split(root, split, config.val_fraction, canvas_shape)


__all__ = [
    "CLIP_DATASETS",
    "ClipSource",
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
