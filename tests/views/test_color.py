"""Photometric changes against Pillow, SciPy and colorsys, on a real photo."""

import colorsys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter
from skimage import data

from jepax.types import UserError
from jepax.views.color import LEJEPA_COLOR, ColorConfig, adjust_hue, blend, distort_color, gaussian_blur, to_grayscale


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(data.astronaut()).resize((64, 48))


@pytest.fixture(scope="module")
def view(photo):
    return jnp.asarray(np.asarray(photo), jnp.float32)[None] / 255


def close_to_pillow(ours, theirs, tolerance=1.0):
    """Within the rounding of Pillow's whole numbers."""
    np.testing.assert_allclose(255 * np.asarray(ours[0]), np.asarray(theirs, np.float32), atol=tolerance)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_contrast_and_saturation_are_pillows(photo, view, factor):
    by = jnp.array([factor])
    close_to_pillow(blend(view, jnp.zeros(()), by), ImageEnhance.Brightness(photo).enhance(factor))
    mean = jnp.mean(to_grayscale(view), axis=(1, 2), keepdims=True)
    close_to_pillow(blend(view, mean, by), ImageEnhance.Contrast(photo).enhance(factor), 1.5)
    close_to_pillow(blend(view, to_grayscale(view), by), ImageEnhance.Color(photo).enhance(factor), 1.5)


def test_grey_and_solarise_are_pillows(photo, view):
    close_to_pillow(to_grayscale(view)[..., 0], photo.convert("L"))
    key = jr.split(jr.key(0), 1)
    close_to_pillow(distort_color(view, key, ColorConfig(grayscale_prob=1.0)), photo.convert("L").convert("RGB"))
    close_to_pillow(distort_color(view, key, ColorConfig(solarize_prob=1.0)), ImageOps.solarize(photo, 128))


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.3])
def test_the_hue_turns_in_hsv(view, turn):
    ours = np.asarray(adjust_hue(view, jnp.array([turn])))[0, ::7, ::7].reshape(-1, 3)
    pixels = np.asarray(view, np.float64)[0, ::7, ::7].reshape(-1, 3)
    for pixel, turned in zip(pixels, ours, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        np.testing.assert_allclose(turned, colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), atol=1e-5)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_a_gaussian_filter(view, sigma):
    ours = np.asarray(gaussian_blur(view, jnp.array([sigma]), 6))[0]
    radius = {"mode": "mirror", "radius": 6, "axes": (0, 1)}
    np.testing.assert_allclose(ours, gaussian_filter(np.asarray(view[0], np.float64), sigma, **radius), atol=1e-5)


def test_chances_and_keys(view):
    views = jnp.broadcast_to(view, (64, *view.shape[1:]))
    keys = jr.split(jr.key(0), 64)
    config = ColorConfig(**LEJEPA_COLOR)
    changed = jax.jit(distort_color, static_argnums=2)(views, keys, config)
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-6
    some = jnp.array([5, 40])
    np.testing.assert_allclose(distort_color(views[some], keys[some], config), changed[some], atol=1e-5)
    np.testing.assert_array_equal(distort_color(views, keys, ColorConfig()), views)
    grays = distort_color(views, keys, ColorConfig(grayscale_prob=0.25))
    share = np.mean(np.ptp(np.asarray(grays), axis=-1).max(axis=(1, 2)) == 0)
    assert 0.1 < share < 0.45


def test_one_channel_keeps_its_shape(view):
    one = to_grayscale(view)
    assert (
        distort_color(one, jr.split(jr.key(1), 1), ColorConfig(**dict.fromkeys(LEJEPA_COLOR, 1.0))).shape == one.shape
    )


@pytest.mark.parametrize(
    "settings", [{"jitter_prob": 1.1}, {"hue": 0.6}, {"blur_sigma": (0.0, 1.0)}, {"grayscale_prob": -0.1}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=f"color.{next(iter(settings))}="):
        ColorConfig(**settings)
