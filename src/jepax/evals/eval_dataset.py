"""A split of the data as one feature extractor sees it: images, features, and labels if they may be read."""

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
from jepax.evals.progress import SILENT, Progress
from jepax.types import ImageBatch, Int

DIGEST_SIDE = 64
"""Large images are subsampled to about this many rows and columns before they are hashed."""
SUBSET_SEED = 20261123
"""Seed of `random_subset`. It does not depend on a run's seed, so that runs are compared on the same images."""
NO_LABEL = -1
"""Replaces every label that may not be read. No class has this number."""
Batch = TypeVar("Batch")


@dataclass(frozen=True, eq=False)
class UnlabeledSource(ImageSource):
    """A source whose labels are replaced by `NO_LABEL`. Protocols get the test split in this form."""

    source: ImageSource

    def load(self, row: int) -> ImageExample:
        return self.source.load(row)._replace(label=NO_LABEL)

    def load_batch(
        self, rows: Int[np.ndarray, " batch"], index: Int[np.ndarray, " batch"] | None = None
    ) -> tuple[ImageBatch, Bool[np.ndarray, " batch"]]:
        images, replaced = self.source.load_batch(rows, index)
        return replace(images, label=np.full_like(images.label, NO_LABEL)), replaced

    def display_name(self, row: int) -> str:
        return self.source.display_name(row)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.source.fingerprint


def without_labels(source: ImageSource) -> UnlabeledSource:
    """The same images without their labels."""
    return UnlabeledSource(source.canvas_shape, source.class_names, np.full_like(source.labels, NO_LABEL), source)


class EvalDataset:
    """One split of the data with one feature extractor."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        source: Source,
        batch_size: int,
        *,
        name: str = "features",
        progress: Progress = SILENT,
        **loading: int,
    ):
        """`loading`: `num_threads` and `num_workers` that read images, as in `jepax.data.batches`."""
        self.extractor, self.source, self.batch_size = extractor, source, batch_size
        self.name, self.progress, self.loading = name, progress, loading
        self.digests: UInt64[np.ndarray, "seen"] = np.empty(0, np.uint64)
        """Hashes of the images, filled when their features are computed: they find duplicates across splits."""
        self.corrupt_rows: set[int] = set()
        """Rows whose image is unreadable and was replaced by another image of its class."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        """Every example's class, in the order of `features` and `images`."""
        return self.source.labels

    @cached_property
    def features(self) -> Features:
        """Features of the center views, computed at the first use."""
        with self.progress.bar(self.name, len(self)) as update:
            return extract_features(self.extractor, self._hashed_images(), self.labels, update)

    def _hashed_images(self) -> Iterator[tuple[ImageBatch, int]]:
        """Yields `images`, and stores their digests."""
        digests = []
        for images, valid in self.images():
            digests.append(digest(images)[:valid])
            yield images, valid
        self.digests = np.concatenate(digests) if digests else self.digests

    def images(self) -> Iterator[tuple[ImageBatch, int]]:
        """Yields every example once, in order, with the number of valid rows of each batch."""
        return self._report_corrupt(partial(iter_once, self.source, self.batch_size, **self.loading))

    def shuffled(self, batch_size: int, steps: int, seed: int) -> Iterator[ImageBatch]:
        """Yields `steps` batches. The order follows from the seed, and differs from epoch to epoch."""
        sizes = {"batch_size": batch_size, "steps": steps, "seed": seed}
        return self._report_corrupt(partial(batches, self.source, **sizes, **self.loading))

    def _report_corrupt(self, read: Callable[..., Iterator[Batch]]) -> Iterator[Batch]:
        """Yields what `read` yields, then logs how many images were replaced if that number has grown."""
        before = len(self.corrupt_rows)
        yield from read(on_corrupt=lambda rows: self.corrupt_rows.update(rows.tolist()))
        if len(self.corrupt_rows) > before:
            log = warnings.warn if self.progress is SILENT else self.progress.log
            log(
                f"{self.name}: {len(self.corrupt_rows)} of {len(self)} images are unreadable, the first is"
                f" {self.source.display_name(min(self.corrupt_rows))}; each was replaced by another image of its class"
            )


def random_subset(source: Source, count: int) -> Source:
    """`count` images drawn at random, or all of them, in the source's order."""
    order = np.argsort(np.random.Philox(SUBSET_SEED).random_raw(len(source)), kind="stable")
    rows: Int[np.ndarray, "rows"] = np.sort(order[:count])
    return Subset(source.canvas_shape, source.class_names, source.labels[rows], source, rows)


def count_duplicates(datasets: dict[str, EvalDataset]) -> dict[str, int]:
    """Counts the images of the later split of each pair that are in the earlier one: `{"train/test": 0, ...}`.

    Datasets whose features were not computed are read once to hash their images.
    """
    for data in datasets.values():
        if not len(data.digests):
            with data.progress.bar("looking for images that are in two splits", len(data)) as update:
                for number, _ in enumerate(data._hashed_images(), 1):
                    update(min(number * data.batch_size, len(data)))
    pairs = itertools.combinations(datasets.items(), 2)
    return {f"{one}/{two}": int(np.isin(b.digests, a.digests).sum()) for (one, a), (two, b) in pairs}


def digest(images: ImageBatch) -> UInt64[np.ndarray, "batch"]:
    """64-bit hash of each image's size and pixels; large images are subsampled first."""
    stride = max(1, max(images.canvas.shape[1:3]) // DIGEST_SIDE)
    pixels = np.ascontiguousarray(images.canvas[:, ::stride, ::stride])
    hashes = [
        hashlib.blake2b(p.tobytes() + s.tobytes(), digest_size=8).digest()
        for p, s in zip(pixels, images.size, strict=True)
    ]
    return np.frombuffer(b"".join(hashes), np.uint64)
