"""Frozen features: run an encoder over a split once, in a stream, and keep the result on the host."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import equinox as eqx
import jax
import numpy as np

from jepax.distributed.sharding import shard_if_possible
from jepax.types import Array, Float, ImageBatch, Int, UserError

EmbedFn = Callable[[ImageBatch], Float[Array, "layers batch dim"]]
"""Features of a batch from each of the last (up to four) layers, the very last one at the end."""


class NonFiniteFeaturesError(UserError):
    """An encoder's features are not finite."""


@dataclass(frozen=True)
class Features:
    """Features of one split, float32 on the host.

    **Raises** `NonFiniteFeaturesError` where a value is not finite: accuracies would be meaningless.
    """

    layers: Float[np.ndarray, "layers n dim"]
    labels: Int[np.ndarray, "n"]

    def __post_init__(self):
        if not all(np.isfinite(part).all() for layer in self.layers for part in np.array_split(layer, 16)):
            raise NonFiniteFeaturesError(
                "features are not finite: the encoder has diverged or its input holds NaN.\n"
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
        """The layers as the device reads them: the same memory on a CPU, a copy elsewhere."""
        return jax.device_put(self.layers, may_alias=True)


def extract_features(
    embed: EmbedFn,
    batches: Iterable[tuple[ImageBatch, int]],
    labels: Int[np.ndarray, "n"],
    progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """Embed every example of a sweep into one array, allocated once: memory holds that and the batches under way.

    `embed` is compiled once, since batches share one shape. Give it as an Equinox module or `eqx.Partial`: the arrays
    of a plain closure would be compiled in as constants. It does not see the labels.

    - `batches`: pairs of a batch and the number of its valid examples; the rest, at the end of the batch, is padding.
    - `labels`: of every example, in the order of the sweep.
    - `progress`: called after each batch with the number of examples done.

    **Raises** `UserError` if the sweep is empty.
    """
    run, kept, waiting, done = eqx.filter_jit(embed), None, None, 0
    for images, valid in batches:
        ahead = (run(shard_if_possible(replace(images, label=None))), slice(done, done + valid))
        if kept is None:
            layers, _, dim = ahead[0].shape
            kept = empty_aligned((layers, len(labels), dim))
        if waiting is not None:  # fetched one batch late, so that the device works while the host copies
            _copy_rows(kept, *waiting)
        waiting, done = ahead, done + valid
        progress(done)
    if waiting is None:
        raise UserError("no batches to extract features from: the split is empty; choose another split or source")
    _copy_rows(kept, *waiting)
    return Features(kept[:, :done], np.asarray(labels, np.int32)[:done])


def empty_aligned(shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """An empty float32 array that begins at a multiple of 64 bytes: a CPU device can then read it without a copy."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def _copy_rows(kept: Float[np.ndarray, "layers n dim"], output: Float[Array, "layers batch dim"], rows: slice) -> None:
    kept[:, rows] = np.asarray(output, dtype=np.float32)[:, : rows.stop - rows.start]
