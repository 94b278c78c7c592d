"""Which encoder is evaluated, and what is read of it."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from skimage.transform import resize

from jepax.evals.feature_extractor import PixelFeatures, ViTFeatures, downscale, select_encoder
from jepax.nn import ViT, ViTConfig
from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig
from tests.contracts.shrink import shrunk


def method_of(recipe):
    return eqx.filter_eval_shape(lambda: shrunk(recipe).method.build(total_steps=3, key=jr.key(0)))


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("ijepa_fashion_mnist", ["target", "context"]),
        ("ijepa_fashion_mnist_no_teacher", ["context"]),
        ("byol_fashion_mnist", ["context", "target"]),
        ("vicreg_fashion_mnist", ["context"]),
    ],
)
def test_a_methods_encoders_by_name_the_default_first(recipe, names):
    method = method_of(recipe)
    encoders = method.encoders()
    assert list(encoders) == names and encoders["context"] is method.encoder
    assert all(type(encoder) is ViT for encoder in encoders.values())
    assert len(set(map(id, encoders.values()))) == len(names)
    assert select_encoder(method, "default") is encoders[names[0]]
    assert select_encoder(method, names[-1]) is encoders[names[-1]]


def test_an_encoder_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"eval\.encoder=target: .*; it has context"):
        select_encoder(method_of("vicreg_fashion_mnist"), "target")


def test_tokens_are_the_last_layers_and_pooling_reads_four_layers():
    encoder = ViT(ViTConfig(patch_size=4, in_channels=1, width=16, depth=6, num_heads=2), key=jr.key(0))
    view = jr.normal(jr.key(1), (3, 8, 12, 1))
    row = ViTFeatures(encoder, CropConfig(size=(8, 12), mean=(0.5,), std=(0.25,)))
    tokens, pooled = row.tokens(view), row.pooled(view)
    assert tokens.shape == (3, 6, 16) and pooled.shape == (4, 3, 16)
    np.testing.assert_array_equal(tokens, encoder(view))
    np.testing.assert_allclose(pooled[-1], jnp.mean(tokens, 1), atol=1e-6)
    np.testing.assert_allclose(pooled, encoder.intermediate_layers(view, 4).mean(2), atol=1e-6)


PLAIN = CropConfig(size=(28, 28), mean=(0.0,), std=(1.0,), eval_resize_ratio=1.0)


def test_small_views_are_only_flattened():
    canvas = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28, 1)
    images = ImageBatch(canvas, np.full((3, 2), 28, np.int32), np.arange(3, dtype=np.int32))
    row = PixelFeatures(PLAIN, 7)
    features = row(images)
    assert features.shape == (1, 3, 784)
    np.testing.assert_allclose(features[0], canvas.reshape(3, -1) / 255, atol=1e-6)
    tokens = row.tokens(jnp.asarray(canvas, jnp.float32))
    assert tokens.shape == (3, 16, 49)
    np.testing.assert_array_equal(tokens[1, 5], canvas[1, 7:14, 7:14].reshape(-1))


@pytest.mark.parametrize(("shape", "expected"), [((224, 224), (32, 32)), ((64, 33), (32, 16)), ((300, 4), (32, 1))])
def test_large_views_are_scaled_down(shape, expected):
    out = downscale(jnp.ones((2, *shape, 3)))
    assert out.shape == (2, *expected, 3)
    np.testing.assert_allclose(out, 1.0, rtol=1e-5)


def test_scaling_down_is_antialiased():
    row, column = np.mgrid[:96, :96]
    stripes = ((row + column) % 2).astype(np.float32)
    smooth = np.sin(row / 20) * np.cos(column / 15)
    picture = (stripes + smooth).astype(np.float32)
    out = downscale(jnp.asarray(picture)[None, :, :, None])[0, :, :, 0]
    expected = resize(smooth + 0.5, (32, 32), order=1, anti_aliasing=True)
    np.testing.assert_allclose(out[1:-1, 1:-1], expected[1:-1, 1:-1], atol=0.07)
