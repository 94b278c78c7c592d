"""A split as a row of the evaluation sees it: its pictures, its features, and its labels, if they may be read."""

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, UInt64

from jepax.data import Source, batches, iter_once
from jepax.data.sources import ImageExample, ImageSource, Subset
from jepax.evals.feature_extractor import FeatureExtractor
from jepax.evals.features import Features, extract_features
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.types import ImageBatch, Int

MAX_DIGEST_SIDE = 64
"""Rows and columns, about, of what is digested of a large picture."""
SUBSET_SEED = 20261123
"""Of `some` pictures, which never depend on a run's seed: two runs may be compared."""
HIDDEN_LABEL = -1
"""Stands for every label that may not be read; no class has it."""
Batch = TypeVar("Batch")


@dataclass(frozen=True, eq=False)
class UnlabeledSource(ImageSource):
    """A source whose labels are kept back: protocols are given the test split so, and cannot read what they may not."""

    source: ImageSource

    def load(self, row: int) -> ImageExample:
        return self.source.load(row)._replace(label=HIDDEN_LABEL)

    def load_batch(
        self, rows: Int[np.ndarray, " batch"], index: Int[np.ndarray, " batch"] | None = None
    ) -> tuple[ImageBatch, Bool[np.ndarray, " batch"]]:
        images, replaced = self.source.load_batch(rows, index)
        return replace(images, label=np.full_like(images.label, HIDDEN_LABEL)), replaced

    def display_name(self, row: int) -> str:
        return self.source.display_name(row)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.source.fingerprint


def hide_labels(source: Source) -> UnlabeledSource:
    """The same pictures without their labels."""
    return UnlabeledSource(source.canvas_shape, source.class_names, np.full_like(source.labels, HIDDEN_LABEL), source)


class EvalDataset:
    """One split of the data, before one row's encoder."""

    def __init__(
        self,
        row: FeatureExtractor,
        source: Source,
        batch_size: int,
        *,
        threads: int = 2,
        workers: int = 0,
        name: str = "features",
        say: ProgressReporter = SILENT_PROGRESS,
    ):
        self.row, self.source, self.batch_size, self.name, self.say = row, source, batch_size, name, say
        self.reading = {"threads": threads, "workers": workers}
        self.digests: UInt64[np.ndarray, "seen"] = np.empty(0, np.uint64)
        """Of the pictures, once they were embedded: they tell what stands in two splits."""
        self.broken: set[int] = set()
        """Rows whose pictures could not be read and gave way to others of their class."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        """Every example's class, in the order of `features` and `pictures`."""
        return self.source.labels

    @cached_property
    def features(self) -> Features:
        """Of the centre views, embedded at the first use and kept."""
        with self.say.counting(self.name, len(self)) as done:
            return extract_features(self.row, self._noted(), self.labels, done)

    def _noted(self) -> Iterator[tuple[ImageBatch, int]]:
        """`pictures`, whose digests are kept."""
        found = []
        for images, valid in self.pictures():
            found.append(digest_images(images)[:valid])
            yield images, valid
        self.digests = np.concatenate(found) if found else self.digests

    def pictures(self) -> Iterator[tuple[ImageBatch, int]]:
        """Every example once, in order, with the number of valid rows of each batch."""
        return self._told(partial(iter_once, self.source, self.batch_size, **self.reading))

    def shuffled(self, batch_size: int, steps: int, seed: int) -> Iterator[ImageBatch]:
        """Batches of `steps` steps in the order of `seed`, a new one each epoch."""
        sizes = {"batch_size": batch_size, "steps": steps, "seed": seed}
        return self._told(partial(batches, self.source, **sizes, **self.reading))

    def _told(self, read: Callable[..., Iterator[Batch]]) -> Iterator[Batch]:
        """What is read; at its end it is said how many pictures gave way to others, if that was not said before."""
        before, found = set(self.broken), self.broken
        yield from read(on_corrupt=lambda rows: found.update(rows.tolist()))
        if found - before:
            first, tell = (
                self.source.display_name(min(found)),
                warnings.warn if self.say is SILENT_PROGRESS else self.say.line,
            )
            tell(
                f"{self.name}: {len(found)} of {len(self)} pictures cannot be read, the first of them {first};"
                " each gave way to another of its class"
            )


def random_subset(source: Source, count: int) -> Source:
    """`count` pictures drawn at random, or all of them, in the source's order."""
    order = np.argsort(np.random.Philox(SUBSET_SEED).random_raw(len(source)), kind="stable")
    rows: Int[np.ndarray, "rows"] = np.sort(order[:count])
    return Subset(source.canvas_shape, source.class_names, source.labels[rows], source, rows)


def count_duplicates(splits: dict[str, EvalDataset]) -> dict[str, int]:
    """How many pictures of the later split of each pair are in the earlier one too: `{"train/test": 0, ...}`.

    Splits that were embedded have noted their pictures; the others are read for it.
    """
    digests = {name: split.digests if len(split.digests) else _digest_split(split) for name, split in splits.items()}
    pairs = itertools.combinations(digests, 2)
    return {f"{one}/{two}": int(np.isin(digests[two], digests[one]).sum()) for one, two in pairs}


def _digest_split(split: EvalDataset) -> UInt64[np.ndarray, "seen"]:
    with split.say.counting("looking for pictures that stand in two splits", len(split)) as done:
        found = []
        for images, valid in split.pictures():
            found.append(digest_images(images)[:valid])
            done(sum(map(len, found)))
    return np.concatenate(found)


def digest_images(images: ImageBatch) -> UInt64[np.ndarray, "batch"]:
    """64 bits of each picture's size and of its pixels, of which every few stand for a large picture."""
    stride = max(1, max(images.canvas.shape[1:3]) // MAX_DIGEST_SIDE)
    thin = np.ascontiguousarray(images.canvas[:, ::stride, ::stride])
    sums = [
        hashlib.blake2b(p.tobytes() + s.tobytes(), digest_size=8).digest()
        for p, s in zip(thin, images.size, strict=True)
    ]
    return np.frombuffer(b"".join(sums), np.uint64)
