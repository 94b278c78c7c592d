"""Extraction keeps every example once and in order, in one array that is allocated once."""

import tracemalloc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from jepax.distributed.sharding import shard_if_possible
from jepax.evals.features import Features, empty_aligned, extract_features
from jepax.types import ImageBatch, UserError


class Embed(eqx.Module):
    """Two layers: the first pixel, and twice that."""

    width: int = eqx.field(static=True, default=1)

    def __call__(self, images: ImageBatch):
        assert images.label is None, "labels must not reach an encoder"
        x = jnp.tile(jnp.asarray(images.canvas, jnp.float32)[:, 0, 0, :1], (1, self.width))
        return jnp.stack([x, 2 * x])


def batches(count=10, size=4):
    """A sweep as the loader makes it: the last batch is padded with copies of example 0."""
    for start in range(0, count, size):
        index = np.arange(start, start + size)
        index = np.where(index < count, index, 0).astype(np.int32)
        canvas = np.broadcast_to(index[:, None, None, None] % 256, (size, 2, 2, 1)).astype(np.uint8)
        label = (index % 3).astype(np.int32)
        yield ImageBatch(canvas, np.full((size, 2), 2, np.int32), index, label), min(size, count - start)


LABELS = (np.arange(10) % 3).astype(np.int32)


def test_every_example_once_and_in_order():
    seen = []
    features = extract_features(Embed(), batches(), LABELS, seen.append)
    assert features.layers.dtype == np.float32
    np.testing.assert_array_equal(features.layers[:, :, 0], [np.arange(10), 2 * np.arange(10)])
    np.testing.assert_array_equal(features.labels, LABELS)
    assert seen == [4, 8, 10]


def test_memory_holds_the_features_and_a_few_batches():
    """Peak of what Python and NumPy allocate: the features themselves, and no second copy of them."""
    count, width = 20_000, 64
    whole = 2 * count * width * 4
    extract_features(Embed(width), batches(count=256, size=256), np.zeros(256, np.int32))  # compiles
    tracemalloc.start()
    extract_features(Embed(width), batches(count=count, size=256), np.zeros(count, np.int32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole < peak < 1.15 * whole


def test_the_device_of_a_cpu_reads_the_same_memory():
    features = extract_features(Embed(), batches(), LABELS)
    assert features.layers.ctypes.data % 64 == 0
    assert features.on_device.unsafe_buffer_pointer() == features.layers.ctypes.data
    assert empty_aligned((3, 5)).ctypes.data % 64 == 0


def test_eight_devices_share_the_work_and_give_the_same():
    """40 pictures in batches of 8, one to a device; batches of 5 cannot be shared."""
    labels = np.zeros(40, np.int32)
    shared, alone = (extract_features(Embed(), batches(count=40, size=size), labels) for size in (8, 5))
    np.testing.assert_array_equal(shared.layers, alone.layers)
    images, _ = next(batches(count=40, size=8))
    assert len(shard_if_possible(images).canvas.sharding.device_set) == 8
    images, _ = next(batches(count=40, size=5))
    assert shard_if_possible(images) is images


def test_an_empty_sweep_is_refused():
    with pytest.raises(UserError, match="no batches"):
        extract_features(Embed(), [], np.zeros(0, np.int32))


def test_features_that_are_not_finite_are_refused():
    layers = np.zeros((1, 200, 3), np.float32)
    for row in (0, 199):
        layers[0, row, 2] = np.nan
        with pytest.raises(UserError, match="not finite"):
            Features(layers, np.zeros(200, np.int32))
        layers[0, row, 2] = 0
