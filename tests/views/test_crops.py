"""Crops against Pillow on real photos, and what a key alone must decide."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig, center_crop, denormalize, random_resized_crop
from jepax.views.crops import normalize, resize_crop, sample_boxes

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GRAY = CropConfig(size=(28, 28), scale=(0.6, 1.0), mean=(0.2860,), std=(0.3530,), eval_resize_ratio=1.0)


def photos() -> dict[str, np.ndarray]:
    china, flower = load_sample_images().images
    named = {"astronaut": skimage.data.astronaut(), "cat": skimage.data.chelsea(), "coffee": skimage.data.coffee()}
    return named | {"china": china, "flower": flower, "gray": skimage.data.camera()[..., None]}


PHOTOS = photos()


def batch(pictures: list[np.ndarray], side: int | None = None) -> ImageBatch:
    """Pictures in the corner of one canvas; the canvas's rest is noise, which no view may show."""
    side = side or max(max(picture.shape[:2]) for picture in pictures)
    shape = (len(pictures), side, side, pictures[0].shape[2])
    canvas = np.random.default_rng(side).integers(0, 256, shape, dtype=np.uint8)
    for place, picture in zip(canvas, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    size = np.asarray([picture.shape[:2] for picture in pictures], np.int32)
    return ImageBatch(canvas, size, np.arange(len(pictures), dtype=np.int32))


COLOR = [picture for name, picture in PHOTOS.items() if name != "gray"]
PACKED = batch(COLOR)


resize = jax.jit(resize_crop, static_argnames=("size", "interpolation"))
jit_random = jax.jit(random_resized_crop, static_argnames="config")
jit_center = jax.jit(center_crop, static_argnames="config")
jit_boxes = jax.jit(sample_boxes, static_argnames="config")


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.vmap(lambda index: jr.fold_in(jr.key(seed), index))(jnp.arange(count))


def pillow(picture: np.ndarray, box: tuple[int, ...], size: tuple[int, int], filter: str) -> np.ndarray:
    top, left, height, width = box
    crop = Image.fromarray(picture.squeeze()).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize(size[::-1], PILLOW[filter])).reshape(*size, -1) / 255


def assert_close_to_pillow(view: np.ndarray, expected: np.ndarray) -> None:
    """Up to Pillow's rounding to whole values in its two passes; that alone makes 0.25 to 0.31 on average."""
    difference = 255 * np.abs(np.asarray(view) - expected)
    assert difference.max() <= 1.5
    assert difference.mean() < 0.32


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (28, 28)])
def test_resample_equals_pillows_crop_then_resize(size, filter):
    for box in [(0, 0, 300, 400), (100, 120, 180, 250), (5, 7, 45, 60), (11, 300, 17, 90)]:
        views = resize(PACKED.canvas, np.asarray([box] * len(COLOR)), size, filter)
        for view, picture in zip(views, COLOR, strict=True):
            assert_close_to_pillow(view, pillow(picture, box, size, filter))


@pytest.mark.parametrize("filter", PILLOW)
def test_fractional_box_within_wider_limits_equals_pillows_resize_of_a_box(filter):
    picture, box, whole = PHOTOS["gray"], (10.3, 20.7, 171.25, 90.5), (0, 0, 512, 512)
    corners = (box[1], box[0], box[1] + box[3], box[0] + box[2])
    expected = Image.fromarray(picture[..., 0]).resize((48, 64), PILLOW[filter], box=corners)
    view = resize(picture[None], np.asarray([box]), (64, 48), filter, limits=np.asarray([whole]))[0, ..., 0]
    assert_close_to_pillow(view, np.asarray(expected) / 255)


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("box", [(40, 50, 200, 120), (40, 50, 20, 30), (0, 0, 1, 1)])
def test_nothing_outside_the_box_is_read(filter, box):
    picture = PHOTOS["astronaut"]
    top, left, height, width = box
    noisy = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    inside = np.s_[top : top + height, left : left + width]
    noisy[inside] = picture[inside]
    first, second = resize(np.stack([picture, noisy]), np.asarray([box, box]), (64, 64), filter)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("filter", PILLOW)
def test_flip_mirrors_left_and_right_where_asked(filter):
    canvas, box = np.stack([PHOTOS["cat"]] * 2), np.asarray([(30, 40, 200, 301)] * 2)
    plain = resize(canvas, box, (32, 48), filter)
    flipped = resize(canvas, box, (32, 48), filter, flip=jnp.asarray([True, False]))
    np.testing.assert_allclose(flipped[0], plain[0, :, ::-1], atol=1e-6)
    np.testing.assert_allclose(flipped[1], plain[1], atol=1e-6)


@pytest.mark.parametrize("filter", PILLOW)
def test_whole_pictures_of_the_views_size_come_through_unchanged(filter):
    pictures = [PHOTOS["gray"][:28, :28], PHOTOS["gray"][200:228, 200:228]]
    view = jit_center(batch(pictures), dataclasses.replace(GRAY, interpolation=filter))
    np.testing.assert_allclose(denormalize(view, GRAY), np.stack(pictures) / 255, atol=1e-6)


@pytest.mark.parametrize("filter", PILLOW)
@pytest.mark.parametrize("side, eval_resize_ratio", [(224, 256 / 224), (224, 1.0), (64, 1.25)])
def test_centre_crop_equals_pillows_resize_then_crop(side, eval_resize_ratio, filter):
    config = CropConfig(size=(side, side), interpolation=filter, eval_resize_ratio=eval_resize_ratio)
    views = denormalize(jit_center(PACKED, config), config)
    for view, picture in zip(views, COLOR, strict=True):
        height, width = picture.shape[:2]
        shorter = round(side * eval_resize_ratio)
        resized = [int(shorter * length / min(height, width)) for length in (width, height)]
        left, top = ((length - side) // 2 for length in resized)
        image = Image.fromarray(picture).resize(tuple(resized), PILLOW[filter])
        assert_close_to_pillow(view, np.asarray(image.crop((left, top, left + side, top + side))) / 255)


def test_centre_crop_of_another_shape_covers_it():
    config = CropConfig(size=(40, 100), eval_resize_ratio=1.0)
    view = denormalize(jit_center(batch([PHOTOS["astronaut"]]), config), config)[0]
    expected = Image.fromarray(PHOTOS["astronaut"]).resize((100, 100), PILLOW["bilinear"]).crop((0, 30, 100, 70))
    assert_close_to_pillow(view, np.asarray(expected) / 255)


def test_a_view_depends_on_its_picture_and_key_alone():
    config = CropConfig(size=(32, 32), hflip_prob=0.5)
    pictures = [PHOTOS[name] for name in ("astronaut", "cat", "coffee")]
    together = jit_random(batch(pictures), keys(3), config)
    for index, picture in enumerate(pictures):
        alone = jit_random(batch([picture], side=700), keys(3)[index : index + 1], config)[0]
        np.testing.assert_allclose(alone, together[index], atol=1e-5)
    other = jit_random(batch(pictures), keys(3, seed=1), config)
    assert np.abs(other - together).max(axis=(1, 2, 3)).min() > 0.1


def test_random_crop_is_its_box_resampled_and_flipped_by_chance():
    pictures = [PHOTOS["astronaut"][:64, :64]] * 400
    whole = CropConfig(size=(8, 8), scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip_prob=0.3)
    plain = jit_center(batch(pictures[:1]), dataclasses.replace(whole, eval_resize_ratio=1.0))[0]
    views = jit_random(batch(pictures), keys(400), whole)
    is_plain = np.abs(views - plain).max(axis=(1, 2, 3)) < 1e-5
    is_mirror = np.abs(views - plain[:, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    assert np.all(is_plain ^ is_mirror)
    assert 0.2 < is_mirror.mean() < 0.4


def simulated_boxes(height: int, width: int, config: CropConfig, count: int) -> np.ndarray:
    """The usual loop: draw until a box fits, at most ten times."""
    rng, boxes = np.random.default_rng(0), []
    while len(boxes) < count:
        for _ in range(10):
            area = height * width * rng.uniform(*config.scale)
            ratio = math.exp(rng.uniform(*np.log(config.ratio)))
            tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < tall <= height and 0 < wide <= width:
                boxes.append((rng.integers(height - tall + 1), rng.integers(width - wide + 1), tall, wide))
                break
    return np.asarray(boxes)


@pytest.mark.parametrize("height, width", [(300, 451), (512, 512), (28, 28)])
def test_boxes_are_distributed_as_in_the_usual_loop(height, width):
    config, count = CropConfig(), 8000
    size = jnp.broadcast_to(jnp.asarray([height, width]), (count, 2))
    boxes, expected = np.asarray(jit_boxes(keys(count), size, config)), simulated_boxes(height, width, config, count)
    assert np.all(boxes >= 0) and np.all(boxes[:, :2] + boxes[:, 2:] <= (height, width))
    last = np.any((boxes[:, :2] > 0) & (boxes[:, :2] + boxes[:, 2:] == (height, width)), axis=0)
    assert np.all(last), "the last offset is never drawn"
    for drawn, usual in zip(statistics(boxes, height, width), statistics(expected, height, width), strict=True):
        grid = np.unique(usual)
        gaps = [np.searchsorted(np.sort(x), grid, "right") / count for x in (drawn, usual)]
        assert np.abs(gaps[0] - gaps[1]).max() < 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov, p < 0.001


def statistics(boxes: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    top, left, tall, wide = boxes.T
    return [tall * wide / (height * width), np.log(wide / tall), top, left]


@pytest.mark.parametrize("picture, box", [((100, 10), (43, 0, 13, 10)), ((10, 100), (0, 43, 10, 13))])
def test_a_picture_no_draw_fits_gives_its_central_box(picture, box):
    config = CropConfig(scale=(0.9, 1.0))
    boxes = jit_boxes(keys(20), jnp.broadcast_to(jnp.asarray(picture), (20, 2)), config)
    np.testing.assert_array_equal(boxes, np.broadcast_to(box, (20, 4)))


def test_normalise_and_back():
    config = CropConfig(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = jr.uniform(jr.key(0), (2, 4, 5, 3))
    np.testing.assert_allclose(normalize(jnp.ones((1, 1, 3)), config), [[[1.0, 3.0, 1.0]]])
    np.testing.assert_allclose(denormalize(normalize(pixels, config), config), pixels, atol=1e-6)


def test_jit_compiles_once_for_pictures_of_different_sizes():
    traces = []

    @jax.jit
    def views(images, keys):
        traces.append(None)
        config = CropConfig(size=(16, 16))
        return random_resized_crop(images, keys, config), center_crop(images, config)

    for seed, name in enumerate(("astronaut", "cat", "coffee")):
        for view in views(batch([PHOTOS[name]], side=640), keys(1, seed)):
            assert view.shape == (1, 16, 16, 3) and np.all(np.isfinite(view))
    assert len(traces) == 1


def test_channels_must_match_mean_and_std():
    with pytest.raises(UserError, match=r"crop\.mean=\(0\.286,\).*3 channel"):
        jit_center(batch([PHOTOS["cat"]]), GRAY)


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", (0, 28)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.5)),
        ("ratio", (0.0, 1.0)),
        ("hflip_prob", 1.5),
        ("mean", ()),
        ("mean", (0.5,)),
        ("std", (1.0, 1.0, 0.0)),
        ("eval_resize_ratio", 0.9),
        ("eval_resize_ratio", math.nan),
    ],
)
def test_a_bad_value_is_named(field, value):
    named = "std" if value == (0.5,) else field
    with pytest.raises(UserError, match=rf"^crop\.{named}=.* it needs "):
        CropConfig(**{field: value})
