"""The encoder: any grid, only the selected patches, intermediate layers in one pass."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.nn import VIT_SIZES, ViT, ViTConfig, kernels, transformer
from jepax.nn.pos_embed import sincos_2d
from jepax.nn.transformer import FAST
from jepax.nn.vit import patchify
from jepax.trees import count_parameters
from jepax.types import UserError

TINY = {"patch_size": 4, "width": 16, "depth": 3, "num_heads": 2}


def tiny(**changes):
    return ViT(ViTConfig(**TINY | changes), key=jr.key(0))


@pytest.mark.parametrize(("size", "channels"), [((8, 8), 1), ((8, 16), 3), ((20, 4), 3)])
def test_any_grid_and_channels(size, channels):
    images = jr.normal(jr.key(1), (2, *size, channels))
    tokens = tiny(in_channels=channels)(images)
    assert tokens.shape == (2, size[0] * size[1] // 16, 16)


def test_patches_are_row_major_and_whole():
    image = jnp.arange(8 * 12 * 3, dtype=jnp.float32).reshape(1, 8, 12, 3)
    patches = patchify(image, 4)
    assert patches.shape == (1, 6, 48)
    np.testing.assert_array_equal(patches[0, 4].reshape(4, 4, 3), image[0, 4:8, 4:8])


def test_kept_patches_are_those_of_the_whole_image():
    vit, images = tiny(), jr.normal(jr.key(1), (2, 8, 12, 3))
    indices = jnp.array([[5, 0], [3, 4]])
    expected = jnp.take_along_axis(vit.embed_patches(images), indices[..., None], axis=1)
    np.testing.assert_allclose(vit.embed_patches(images, indices), expected, atol=1e-6)
    assert vit(images, indices).shape == (2, 2, 16)


def test_patches_that_are_not_kept_are_not_seen():
    vit, images, indices = tiny(), jr.normal(jr.key(1), (1, 8, 8, 3)), jnp.array([[0, 3]])
    np.testing.assert_array_equal(vit(images, indices), vit(images.at[:, :4, 4:].set(9.0), indices))


def test_layers_come_out_of_one_pass():
    vit, images = tiny(), jr.normal(jr.key(1), (2, 8, 8, 3))
    layers = vit.intermediate_layers(images, 4)
    assert layers.shape == (3, 2, 4, 16)  # as many as there are
    np.testing.assert_allclose(layers[-1], vit(images), atol=1e-6)
    np.testing.assert_allclose(vit.intermediate_layers(images, 2), layers[1:], atol=1e-6)


def test_the_plain_form_of_an_encoder_is_the_same_encoder(monkeypatch):
    images, patch_indices = jr.normal(jr.key(1), (2, 8, 8, 3)), jnp.array([[0, 3], [1, 2]])
    np.testing.assert_allclose(tiny(fast=False)(images, patch_indices), tiny()(images, patch_indices), atol=1e-5)
    for name in FAST._fields:  # and none of it is a kernel
        monkeypatch.setattr(kernels, name, None)
    monkeypatch.setattr(transformer, "FAST", None)
    assert tiny(fast=False)(images, patch_indices).shape == (2, 2, 16)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 5.5), ("small", 21.6), ("base", 85.6), ("large", 303), ("huge", 631), ("giant", 1011)],
)
def test_published_sizes(name, millions):
    vit = eqx.filter_eval_shape(lambda key: ViT(ViTConfig(patch_size=14, **VIT_SIZES[name]), key=key), jr.key(0))
    assert abs(count_parameters(vit) / 1e6 / millions - 1) < 0.01


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (16, 16)])
def test_positions_tell_every_patch_apart(grid):
    table = sincos_2d(grid, 16)
    assert table.shape == (grid[0] * grid[1], 16)
    distance = np.abs(table[:, None] - table[None]).max(-1) + np.eye(len(table))
    assert distance.min() > 1e-3


def test_positions_of_one_row_share_their_row_half():
    table = sincos_2d((3, 4), 16).reshape(3, 4, 16)
    np.testing.assert_array_equal(table[1, 0, 8:], table[1, 3, 8:])
    np.testing.assert_array_equal(table[0, 2, :8], table[2, 2, :8])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_heads": 3}, "num_heads=3"), ({"in_channels": 2}, "in_channels=2"), ({"depth": 0}, "depth=0")],
)
def test_settings_that_cannot_be_met_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        ViTConfig(**TINY | changes)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(UserError, match=r"224 is not a multiple of patch_size=15; try a patch_size of 14 or 16"):
        ViTConfig(**TINY | {"patch_size": 15}).grid((224, 224))


def test_a_width_without_positions_is_refused():
    with pytest.raises(UserError, match="width=18"):
        sincos_2d((2, 2), 18)


WITH_CLASS = {"class_token": True, "learned_grid": (2, 3), "norm_epsilon": 1e-12}


def test_a_class_token_sees_all_patches():
    vit, images = tiny(**WITH_CLASS), jr.normal(jr.key(1), (2, 8, 12, 3))
    token = vit.embed_images(images)
    assert token.shape == (2, 16) and vit.positions.shape == (7, 16)
    assert vit(images).shape == (2, 6, 16) and vit.intermediate_layers(images, 2).shape == (2, 2, 6, 16)
    assert np.abs(token - vit.embed_images(images.at[:, :4, :4].add(1.0))).min(axis=1).max() > 1e-4
    plain = tiny(**WITH_CLASS, fast=False)
    np.testing.assert_allclose(token, plain.embed_images(images), atol=1e-5)
    np.testing.assert_allclose(vit(images), plain(images), atol=1e-5)

    # It is the last token: the stack's output there, with all tokens as queries.
    tokens = vit.add_class_token(vit.embed_patches(images))
    np.testing.assert_allclose(token, vit.norm(vit.stack(tokens)[0][:, -1]), atol=1e-5)


def test_options_leave_the_other_parameters_as_they_are():
    vit, other = tiny(), tiny(**WITH_CLASS)
    np.testing.assert_array_equal(vit.embed.weight, other.embed.weight)
    np.testing.assert_array_equal(vit.stack.blocks.mlp.fc1.weight, other.stack.blocks.mlp.fc1.weight)
    assert vit.positions is None and vit.class_token is None


def test_the_published_encoder_of_a_world_model():
    config = ViTConfig(patch_size=14, **VIT_SIZES["tiny"], class_token=True, learned_grid=(16, 16), norm_epsilon=1e-12)
    vit = eqx.filter_eval_shape(lambda key: ViT(config, key=key), jr.key(0))
    assert count_parameters(vit) == 5_501_376


def test_learned_positions_are_for_one_grid():
    with pytest.raises(UserError, match=r"learned_grid=\(2, 3\), but images of \(8, 8\) have \(2, 2\)"):
        tiny(**WITH_CLASS)(jnp.zeros((1, 8, 8, 3)))
