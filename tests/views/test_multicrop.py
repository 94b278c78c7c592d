"""Several views of each image: their sizes, their keys, and what is refused."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.data import DataConfig, iter_once, open_source
from jepax.methods.base import example_keys
from jepax.types import ImageBatch, UserError
from jepax.views import ColorConfig, CropConfig, MultiCropConfig
from jepax.views import multicrop as eager_multicrop


@eqx.filter_jit
def multicrop(images, config, key):
    return eager_multicrop(images, example_keys(key, images.index), config).groups


TONE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CONFIG = MultiCropConfig(
    num_global=2,
    global_crop=CropConfig(size=(24, 24), **TONE),
    num_local=3,
    local_crop=CropConfig(size=(12, 12), scale=(0.05, 0.3), **TONE),
    color=ColorConfig(jitter_prob=0.8, solarize_prob=0.2),
)


@pytest.fixture(scope="module")
def images():
    batch, _ = next(iter(iter_once(open_source(DataConfig(dataset="synthetic", canvas_size=32), "train"), 6)))
    return ImageBatch(*(jnp.asarray(part) for part in (batch.canvas, batch.size, batch.index)))


def test_each_group_has_its_size_and_each_view_its_draw(images):
    groups = multicrop(images, CONFIG, jr.key(0))
    assert [group.shape for group in groups] == [(6, 2, 24, 24, 3), (6, 3, 12, 12, 3)]
    for group in groups:
        assert float(jnp.abs(group).max()) <= 1 + 1e-5
        for first in range(group.shape[1]):
            for second in range(first):
                assert float(jnp.abs(group[:, first] - group[:, second]).max()) > 0.1
    assert len(multicrop(images, MultiCropConfig(global_crop=CONFIG.global_crop), jr.key(0))) == 1


def test_views_belong_to_the_example_and_to_their_number(images):
    whole = multicrop(images, CONFIG, jr.key(1))
    rows = jnp.array([4, 1])
    some = multicrop(ImageBatch(images.canvas[rows], images.size[rows], images.index[rows]), CONFIG, jr.key(1))
    for ours, theirs in zip(some, whole, strict=True):
        np.testing.assert_allclose(ours, theirs[rows], atol=1e-4)
    fewer = multicrop(
        images,
        MultiCropConfig(num_global=1, global_crop=CONFIG.global_crop, color=CONFIG.color),
        jr.key(1),
    )
    np.testing.assert_allclose(fewer[0][:, 0], whole[0][:, 0], atol=1e-5)


def test_the_same_picture_at_other_places_of_the_order_gets_other_views(images):
    alike = ImageBatch(
        jnp.broadcast_to(images.canvas[:1], images.canvas.shape),
        jnp.broadcast_to(images.size[:1], images.size.shape),
        images.index,
    )
    for group in multicrop(alike, CONFIG, jr.key(2)):
        for view in np.asarray(group).swapaxes(0, 1):
            assert len({picture.tobytes() for picture in view}) == len(view)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"views\.num_global=0"):
        MultiCropConfig(num_global=0)
    with pytest.raises(UserError, match=r"views\.local_crop"):
        MultiCropConfig(num_local=1, local_crop=CropConfig(size=(96, 96), **TONE))
