"""I-JEPA of several layers and of the context: each loss is that of its equation."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.ijepa_dense import IJEPADenseConfig, distance_to_nearest
from jepax.types import Masks, UserError
from tests.contracts.shrink import shrunk
from tests.methods.small import drawn, loss_of_views, masked_method, outputs_of
from tests.methods.test_ijepa import smooth_l1


def dense(**settings):
    """The settings of `masked_method()`, of another class."""
    config = IJEPADenseConfig(**vars(shrunk("ijepa_vitb16_in1k").method) | settings)
    return config.build(total_steps=10, key=jr.key(0))


def targets_of(method, views):
    return jnp.moveaxis(outputs_of(method, views).embedded, 1, 0)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"target_layers": (1, 2)}, marks=pytest.mark.long),
        pytest.param({"target_layers": (1,)}, marks=pytest.mark.long),
        {"target_layers": (1, 2), "target_layer_weights": (1.0, 3.0)},
        pytest.param({"context_loss_weight": 0.5}, marks=pytest.mark.long),
    ],
)
def test_each_setting_changes_the_loss_and_stays_finite(images, settings):
    plain, other = (float(loss_of_views(dense(**s), drawn(images, 0), jr.key(0))[0]) for s in ({}, settings))
    assert np.isfinite(other)
    assert abs(plain - other) > 1e-6 * abs(plain)


def test_by_default_it_is_ijepa(images):
    views = drawn(images, 0)
    ours, theirs = (loss_of_views(method, views, jr.key(0))[0] for method in (dense(), masked_method()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.long
def test_layers_are_those_blocks_outputs_and_their_losses_are_weighed(images):
    views = drawn(images, 0)
    single = {layers: targets_of(dense(target_layers=layers), views) for layers in ((1,), (2,), (1, 2), (2, 1))}
    np.testing.assert_allclose(single[1, 2], jnp.concatenate([single[1,], single[2,]]), atol=1e-5)
    np.testing.assert_allclose(single[2, 1], jnp.concatenate([single[2,], single[1,]]), atol=1e-5)
    np.testing.assert_allclose(single[2,], targets_of(dense(), views), atol=1e-5)  # None: the last alone
    assert jnp.abs(single[1,] - single[2,]).max() > 0.01

    def loss_with(weights):
        return float(loss_of_views(dense(target_layers=(1, 2), target_layer_weights=weights), views, jr.key(0))[0])

    first, second, mixed = loss_with((2.0, 0.0)), loss_with((0.0, 1.0)), loss_with((3.0, 1.0))
    np.testing.assert_allclose(mixed, (3 * first + second) / 4, rtol=1e-5)
    assert abs(first - second) > 1e-4


def test_what_is_read_for_collapse_is_the_deepest_layer_whatever_the_order(images):
    views = drawn(images, 0)
    ranks = [
        loss_of_views(dense(target_layers=layers), views, jr.key(0))[1]["embeddings"] for layers in ((1, 2), (2, 1))
    ]
    np.testing.assert_allclose(*ranks, atol=1e-5)


def test_norms_of_tokens_and_the_fraction_explained_are_those_of_their_equations(images):
    """Token by token in float64; the mean of the batch is taken per position, and the norms at the deepest layer."""
    method = dense(target_layers=(2, 1), target_layer_weights=(3.0, 1.0))
    views = drawn(images, 0)
    metrics = loss_of_views(method, views, jr.key(0))[1]
    outputs, masks = outputs_of(method, views), views.masks
    targets, predictions = (np.asarray(x, np.float64) for x in (outputs.embedded, outputs.predictions))
    losses, of_means, norms = np.zeros(2), np.zeros(2), []
    for image, block, place in np.argwhere(np.asarray(masks.target_valid)):
        patch = int(masks.targets[image, block, place])
        for layer in range(2):
            target, prediction = targets[image, layer, patch], predictions[image, layer, block, place]
            losses[layer] += smooth_l1(prediction - target)
            of_means[layer] += smooth_l1(targets[:, layer, patch].mean(0) - target)
        norms.append([np.linalg.norm(x) for x in (targets[image, 0, patch], predictions[image, 0, block, place])])
    weights = np.array((3.0, 1.0))
    np.testing.assert_allclose(
        metrics["train/explained_variance"], 1 - losses @ weights / (of_means @ weights), rtol=1e-5
    )
    expected = np.mean(norms, axis=0)
    np.testing.assert_allclose([metrics["health/target_norm"], metrics["health/prediction_norm"]], expected, rtol=1e-5)


def test_the_context_loss_is_that_of_its_equation(images):
    method = dense(context_loss_weight=0.5)
    views = drawn(images, 0)
    loss, metrics = loss_of_views(method, views, jr.key(0))
    outputs, masks, rows = outputs_of(method, views), views.masks, method.masks.grid[1]
    targets, predictions = np.asarray(outputs.embedded[:, 0]), np.asarray(outputs.on_context[:, 0])
    total, count = 0.0, 0
    for image in range(8):
        for block in range(masks.targets.shape[1]):
            hidden = masks.targets[image, block][masks.target_valid[image, block]]
            for place, patch in enumerate(np.asarray(masks.context[image])):
                near = min(np.hypot(patch // rows - h // rows, patch % rows - h % rows) for h in np.asarray(hidden))
                total += smooth_l1(predictions[image, block, place] - targets[image, patch]) / np.sqrt(near)
                count += 1
    np.testing.assert_allclose(metrics["train/context_loss"], total / count, rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["train/prediction_loss"] + 0.5 * metrics["train/context_loss"], rtol=1e-6)


def test_distances_are_euclidean_to_the_nearest_valid_patch_of_each_block():
    # A grid of 3 rows and 5 columns: patch 7 is at (1, 2), 0 at (0, 0), 14 at (2, 4).
    masks = Masks(
        context=jnp.array([[7, 0]]),
        targets=jnp.array([[[14, 8], [5, 7]]]),
        target_valid=jnp.array([[[True, True], [True, False]]]),
    )
    expected = [[[1.0, np.hypot(1, 3)], [2.0, 1.0]]]
    np.testing.assert_allclose(distance_to_nearest(masks, (3, 5)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context_loss_weight": -1.0}, r"method.context_loss_weight=-1"),
        ({"target_layers": (0,)}, r"method.target_layers=\(0,\) must name blocks from 1 to encoder.depth=12"),
        ({"target_layers": ()}, r"method.target_layers=\(\)"),
        ({"target_layers": (2, 2)}, "twice"),
        (
            {"target_layer_weights": (1.0, 2.0)},
            r"method.target_layer_weights=\(1.0, 2.0\).*method.target_layers=\(12,\)",
        ),
        ({"target_layers": (1, 2), "target_layer_weights": (0.0, 0.0)}, "one above"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        IJEPADenseConfig(**settings)


@pytest.mark.parametrize(
    ("layers", "weights", "tiny"),
    [(None, None, (None, None)), ((12,), (2.0,), ((2,), (2.0,))), ((3, 6, 9), (1.0, 2.0, 3.0), ((1, 2), (2.0, 3.0)))],
)
def test_the_tiny_encoder_has_the_layers_that_are_predicted(layers, weights, tiny):
    config = IJEPADenseConfig(target_layers=layers, target_layer_weights=weights).tiny()
    assert (config.target_layers, config.target_layer_weights) == tiny
