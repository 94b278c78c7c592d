"""Frozen features: embeds a split once, as a stream, and keeps the result on the host."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from jepax.distributed.sharding import shard_if_possible
from jepax.evals.feature_extractor import LayerFeatures
from jepax.types import Array, Float, ImageBatch, Int, UserError

CHUNK = 2048
"""Examples of cached features that are processed at a time. It limits memory and does not change results."""
SplitLayers = Float[np.ndarray, "layers n dim"]
"""Features of every example of a split, float32 on the host."""
Labels = Int[np.ndarray, "n"]
Batches = Iterable[tuple[ImageBatch, int]]
"""Pairs of a batch and the number of its valid examples; the rest, at the end of the batch, is padding."""
T = TypeVar("T")


class NonFiniteFeaturesError(UserError):
    """An encoder's features are not finite."""


@dataclass(frozen=True)
class Features:
    """Features of one split, float32 on the host.

    **Raises** `NonFiniteFeaturesError` if a value is not finite: any accuracy on such features is meaningless.
    """

    layers: SplitLayers
    labels: Labels

    def __post_init__(self):
        if not all(np.isfinite(part).all() for layer in self.layers for part in np.array_split(layer, 16)):
            raise NonFiniteFeaturesError(
                "features are not finite: the encoder has diverged or its input contains NaN.\n"
                "Look at the loss in metrics.jsonl and evaluate an earlier checkpoint."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def last(self) -> Float[np.ndarray, "n dim"]:
        """The last layer."""
        return self.layers[-1]

    @cached_property
    def on_device(self) -> Float[Array, "layers n dim"]:
        """The layers as a device array: the same memory on a CPU, a copy elsewhere."""
        return jax.device_put(self.layers, may_alias=True)


def extract_features(
    embed: Callable[[ImageBatch], LayerFeatures],
    batches: Batches,
    labels: Labels,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Features:
    """Embeds every example of a pass into one array. Memory use is that array and the batches in flight.

    - `embed`: returns the features of a batch. It does not see the labels.
    - `labels`: of every example, in the order of the pass.
    - `on_batch`: called after each batch with the number of examples done.

    **Raises** `UserError` if there is no batch.
    """
    features, done = None, 0
    for output, valid in run_batches(embed, batches):
        if features is None:
            features = empty_aligned((output.shape[0], len(labels), output.shape[2]))
        features[:, done : done + valid] = np.asarray(output)[:, :valid]
        done += valid
        on_batch(done)
    return Features(features[:, :done], np.asarray(labels, np.int32)[:done])


def run_batches(
    function: Callable[[ImageBatch], T], batches: Iterable[tuple[ImageBatch, int]]
) -> Iterator[tuple[T, int]]:
    """Yields the function's value of each batch without its labels, and the number of valid examples.

    One batch late: the device computes the next batch while the host reads this one's result.

    **Raises** `UserError` if there is no batch.
    """
    pending = None
    for images, valid in batches:
        output = function(shard_if_possible(replace(images, label=None))), valid
        if pending is not None:
            yield pending
        pending = output
    if pending is None:
        raise UserError("no batches: the split is empty; choose another split or source")
    yield pending


def empty_aligned(shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """An empty float32 array that begins at a multiple of 64 bytes: a CPU device can then use it without a copy."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def chunks(layers: SplitLayers) -> Iterator[tuple[Float[np.ndarray, "layers chunk dim"], slice]]:
    """Yields chunks of one size, so that one program serves them, each with its rows of the array.

    The last one is padded with zeros.
    """
    for start in range(0, layers.shape[1], CHUNK):
        part = layers[:, start : start + CHUNK]
        padding = CHUNK - part.shape[1]
        yield np.pad(part, ((0, 0), (0, padding), (0, 0))), slice(start, start + part.shape[1])


def map_chunks(function: Callable[[LayerFeatures], PyTree], layers: SplitLayers) -> PyTree:
    """Applies a function of a batch of features to all examples. Returns NumPy arrays with a leading axis of n."""
    outputs = [
        jax.tree.map(lambda array, valid=rows.stop - rows.start: np.asarray(array)[:valid], function(part))
        for part, rows in chunks(layers)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
