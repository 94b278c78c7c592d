"""A generated picture follows from seed, pool and row alone."""

import numpy as np
import pytest

from jepax.data import DataConfig, open_source
from jepax.data.sources import synthetic
from jepax.data.sources.synthetic import SHAPE_NAMES


def pictures(**changes):
    settings = {"images": 16, "canvas_shape": (16, 16, 3)} | changes
    return synthetic.open_split("train", **settings).load_batch(np.arange(8))[0].canvas


def test_deterministic_and_seeded():
    np.testing.assert_array_equal(pictures(), pictures(images=32))
    assert not np.array_equal(pictures(), pictures(seed=1))


def test_order_of_loading_does_not_matter():
    source = synthetic.open_split("train", images=16, canvas_shape=(16, 16, 1))
    every, some = (source.load_batch(np.array(rows))[0] for rows in (range(16), [9, 2, 9]))
    for name in ("canvas", "size", "label", "index"):
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name)[[9, 2, 9]])


def test_splits_share_no_picture():
    config = DataConfig(dataset="synthetic", canvas_size=8, synthetic_size=80, channels=1)
    seen = []
    for split in ("train", "validation", "test"):
        source = open_source(config, split)
        assert source.canvas_shape == (8, 8, 1) and source.class_names == SHAPE_NAMES and source.classes == 8
        seen += [image.tobytes() for image in source.load_batch(np.arange(len(source)))[0].canvas]
    assert len(seen) == 80 + 16 and len(set(seen)) == len(seen)


@pytest.mark.parametrize("canvas_shape", [(1, 1, 3), (2, 3, 1), (9, 16, 3)])
def test_varied_sizes_stay_on_the_canvas(canvas_shape):
    source = synthetic.open_split("train", images=16, canvas_shape=canvas_shape, varied=True)
    images, _ = source.load_batch(np.arange(16))
    assert images.label.tolist() == [*range(8), *range(8)]
    for picture, (height, width) in zip(images.canvas, images.size, strict=True):
        assert (canvas_shape[0] + 1) // 2 <= height <= canvas_shape[0]
        assert (canvas_shape[1] + 1) // 2 <= width <= canvas_shape[1]
        assert not picture[height:].any() and not picture[:, width:].any()
