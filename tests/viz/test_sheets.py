"""The sheets show what the first training step draws, and nothing of a patch that is not seen."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.data import DataConfig
from jepax.methods.base import example_keys
from jepax.methods.lejepa import LeJEPAConfig
from jepax.nn import ViTConfig
from jepax.optim import OptimConfig
from jepax.training import config as train_config
from jepax.training import loop
from jepax.types import Masks
from jepax.views import CropConfig, MaskedViews, MultiCropConfig, denormalize
from jepax.viz import draw_figures, figures
from jepax.viz.sheets import (
    HIDDEN_PATCH_COLOR,
    MaskedExamples,
    blank_hidden_patches,
    masked_examples,
    patch_borders,
    plot_masks,
    plot_views,
)


@pytest.fixture(scope="module")
def images(config):
    return figures.load_first_images(config)


@pytest.fixture(scope="module")
def views(config, images):
    return figures.first_views(config, images)


@pytest.fixture(scope="module")
def shown(config, views) -> MaskedExamples:
    return masked_examples(views, (4, 6), config.method.crop)


def test_images_and_patches_are_the_draw_of_the_first_step(config, images, views, shown):
    method = config.method.build(total_steps=1, key=jr.key(0))
    key = jr.fold_in(jr.fold_in(jr.key(config.seed), 1), 0)
    drawn = eqx.filter_jit(method.draw)(images, example_keys(key, images.index))
    jax.tree.map(np.testing.assert_array_equal, drawn, views)
    masks = views.masks
    np.testing.assert_allclose(shown.pixels, denormalize(views.image, config.method.crop), atol=1e-6)
    for image in range(len(shown.context)):
        assert np.flatnonzero(shown.context[image]).tolist() == np.asarray(masks.context[image]).tolist()
    assert np.array_equal(shown.targets.sum(axis=(2, 3)), masks.target_valid.sum(axis=2))
    assert not np.any(shown.context[:, None] & shown.targets)


@pytest.mark.long
def test_the_key_and_the_images_are_those_of_the_first_training_step(config, monkeypatch, tmp_path):
    steps = train_config.TrainConfig(batch_size=16, steps=300)
    optim = OptimConfig(warmup_epochs=0.0)
    config = train_config.Config(seed=3, method=config.method, data=config.data, optim=optim, train=steps)
    met, drawn, keys = [], [], []

    def first_step(state, batch, base_key, context):
        met.append((base_key, batch))
        raise InterruptedError

    monkeypatch.setattr(loop, "run_train_step", first_step)
    with pytest.raises(InterruptedError):
        loop.train(config, tmp_path)
    first_views = figures.first_views
    monkeypatch.setattr(figures, "example_keys", lambda key, index: keys.append(key) or example_keys(key, index))
    monkeypatch.setattr(figures, "first_views", lambda *given: drawn.append(given) or first_views(*given))
    figures.draw_figures(config, tmp_path)
    (root, taken), ((_, shown),), (key,) = met[0], drawn, keys
    assert jr.fold_in(root, 0) == key
    np.testing.assert_array_equal(np.asarray(taken.canvas)[:8], shown.canvas)
    np.testing.assert_array_equal(np.asarray(taken.index)[:8], shown.index)


def test_a_patch_is_shown_or_blank():
    pixels = np.random.default_rng(0).random((6, 8, 3), np.float32)
    patches = np.array([[True, False], [False, False], [False, True]])
    cut = blank_hidden_patches(pixels, patches)
    np.testing.assert_array_equal(cut[:2, :4], pixels[:2, :4])
    np.testing.assert_array_equal(cut[4:, 4:], pixels[4:, 4:])
    hidden = np.kron(~patches, np.ones((2, 4), bool))
    np.testing.assert_array_equal(cut[hidden], np.broadcast_to(np.float32(HIDDEN_PATCH_COLOR), (hidden.sum(), 3)))


def test_the_sheet_has_one_row_per_image_and_counts_patches(shown):
    figure = plot_masks(shown)
    assert len(figure.axes) == 8 * (2 + 4)
    for row, context, targets in zip(np.reshape(figure.axes, (8, 6)), shown.context, shown.targets, strict=True):
        titles = [cell.get_title() for cell in row]
        assert titles[0] == "view: 16 × 24 px"
        assert titles[1] == f"context: {context.sum()} of 24 patches"
        assert titles[2:] == [f"target {i}: {target.sum()} patches" for i, target in enumerate(targets, 1)]
        blank = np.all(row[1].images[0].get_array() == np.float32(HIDDEN_PATCH_COLOR), axis=2)
        np.testing.assert_array_equal(blank, np.kron(~context, np.ones((4, 4), bool)))


def test_padding_of_short_targets_is_not_shown_and_gray_is_repeated_over_the_colors():
    view = jnp.linspace(-1, 1, 8 * 16 * 24).reshape(8, 16, 24, 1)
    target = jnp.tile(jnp.int32([[[5, 6, 5], [0, 1, 2]]]), (8, 1, 1))
    valid = jnp.tile(jnp.array([[[True, True, False], [True, True, True]]]), (8, 1, 1))
    masks = Masks(context=jnp.tile(jnp.int32([[23]]), (8, 1)), targets=target, target_valid=valid)
    crop = CropConfig(size=(16, 24), mean=(0.5,), std=(0.25,))
    shown = masked_examples(MaskedViews(view, masks), (4, 6), crop)
    assert shown.pixels.shape == (8, 16, 24, 3)
    assert np.ptp(shown.pixels, axis=-1).max() == 0 < np.ptp(shown.pixels)
    assert np.argwhere(shown.targets[7]).tolist() == [[0, 0, 5], [0, 1, 0], [1, 0, 0], [1, 0, 1], [1, 0, 2]]
    assert np.argwhere(shown.context[7]).tolist() == [[3, 5]]


def test_borders_go_round_what_is_marked_and_not_through_it():
    assert len(patch_borders(np.ones((2, 3), bool))) == 2 * (2 + 3)
    assert len(patch_borders(np.eye(2, dtype=bool))) == 8
    assert patch_borders(np.ones((1, 1), bool)).max() == 1


VIEWS = MultiCropConfig(
    num_global=2,
    global_crop=CropConfig(size=(16, 16), scale=(0.3, 1.0)),
    num_local=1,
    local_crop=CropConfig(size=(8, 8), scale=(0.05, 0.3)),
)


@pytest.fixture(scope="module")
def viewed():
    method = LeJEPAConfig(encoder=ViTConfig(patch_size=4, width=12, depth=1, num_heads=1), views=VIEWS)
    return train_config.Config(
        method=method, data=DataConfig(dataset="synthetic", canvas_size=32, synthetic_size=40), seed=3
    )


def test_each_cell_is_a_view_of_the_first_step(viewed):
    images = figures.load_first_images(viewed)
    drawn = figures.first_views(viewed, images)
    axes = np.reshape(plot_views(drawn, images, viewed.method.crop).axes, (8, 4))
    method = viewed.method.build(total_steps=1, key=jr.key(0))
    key = jr.fold_in(jr.fold_in(jr.key(viewed.seed), 1), 0)
    groups = eqx.filter_jit(method.draw)(images, example_keys(key, images.index)).groups
    views = [group[:, view] for group in groups for view in range(group.shape[1])]
    for column, view in enumerate(views, 1):
        expected = np.asarray(denormalize(view, VIEWS.global_crop))
        for row in range(8):
            shown = axes[row, column].images[0].get_array()
            np.testing.assert_allclose(shown, np.broadcast_to(expected[row], shown.shape), atol=1e-5)
    titles = [cell.get_title() for cell in axes[0]]
    assert [title.split(":")[0] for title in titles] == ["center", "global", "global", "local"]
    assert "8 \u00d7 8 px" in titles[3]


def test_a_run_gets_the_sheet(viewed, tmp_path):
    assert draw_figures(viewed, tmp_path) == [tmp_path / "figures" / "views.png"]
