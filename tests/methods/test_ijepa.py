"""I-JEPA: its settings do what they say, and randomness belongs to the example."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.ema import EMAConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.methods.regularizer import RegularizerConfig
from jepax.objectives import covariance, variance
from jepax.types import UserError
from tests.contracts.shrink import shrunk
from tests.methods.small import drawn, loss_of, loss_of_views, masked_method, outputs_of


def smooth_l1(error):
    return np.mean(np.where(np.abs(error) < 1, 0.5 * error**2, np.abs(error) - 0.5))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "l2"},
        pytest.param({"smooth_l1_beta": 0.3}, marks=pytest.mark.long),
        {"target_norm": "none"},
        {"prediction_norm": "affine"},
        pytest.param({"prediction_norm": "no_affine"}, marks=pytest.mark.long),
        pytest.param({"regularizer": RegularizerConfig("vicreg")}, marks=pytest.mark.long),
        pytest.param({"regularizer": RegularizerConfig("visreg", num_slices=8)}, marks=pytest.mark.long),
        pytest.param({"regularizer": RegularizerConfig("sigreg", num_slices=8)}, marks=pytest.mark.long),
        pytest.param({"regularizer": RegularizerConfig("rdmreg", num_slices=8)}, marks=pytest.mark.long),
    ],
)
def test_each_setting_changes_the_loss_and_stays_finite(images, settings):
    plain, other = (float(loss_of_views(masked_method(**s), drawn(images, 0), jr.key(0))[0]) for s in ({}, settings))
    assert np.isfinite(other)
    assert abs(plain - other) > 1e-6 * abs(plain)


def test_a_regulariser_adds_its_weighted_value_of_the_pooled_context(images):
    chosen = RegularizerConfig("vicreg", weight=0.5, variance_weight=3.0, covariance_weight=0.25)
    method = masked_method(regularizer=chosen)
    loss, metrics = loss_of(method, images, jr.key(0))
    views = drawn(images, 0)
    pooled = eqx.filter_jit(lambda f, views: jnp.mean(f(views.image, views.masks.context), axis=1))(
        method.encoder, views
    )
    np.testing.assert_allclose(metrics["train/variance_loss"], variance(pooled), rtol=1e-3)
    np.testing.assert_allclose(metrics["train/covariance_loss"], covariance(pooled), rtol=1e-3)
    weighted = 0.5 * (3.0 * metrics["train/variance_loss"] + 0.25 * metrics["train/covariance_loss"])
    assert weighted > 0
    np.testing.assert_allclose(loss, metrics["train/prediction_loss"] + weighted, rtol=1e-6)
    plain, metrics = loss_of_views(masked_method(), views, jr.key(0))
    np.testing.assert_allclose([plain, metrics["train/prediction_loss"]], loss - weighted, rtol=1e-5)
    assert "train/variance_loss" not in metrics and "train/covariance_loss" not in metrics


@pytest.mark.parametrize("settings", [{}, {"target_norm": "none"}])
def test_norms_of_tokens_and_the_fraction_explained_are_those_of_their_equations(settings, images):
    """Token by token in float64; the mean of the batch is taken per position."""
    method = masked_method(**settings)
    views = drawn(images, 0)
    metrics = loss_of_views(method, views, jr.key(0))[1]
    outputs, masks = outputs_of(method, views), views.masks
    targets, predictions = (np.asarray(x, np.float64) for x in (outputs.embedded, outputs.predictions))
    losses, baselines, norms = [], [], []
    for image, block, place in np.argwhere(np.asarray(masks.target_valid)):
        patch = int(masks.targets[image, block, place])
        target, prediction = targets[image, patch], predictions[image, block, place]
        losses.append(smooth_l1(prediction - target))
        baselines.append(smooth_l1(targets[:, patch].mean(0) - target))
        norms.append([np.linalg.norm(x) for x in (target, prediction)])
    np.testing.assert_allclose(metrics["train/prediction_loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/explained_variance"], 1 - np.sum(losses) / np.sum(baselines), rtol=1e-5)
    expected = np.mean(norms, axis=0)
    np.testing.assert_allclose([metrics["health/target_norm"], metrics["health/prediction_norm"]], expected, rtol=1e-5)


def test_directions_are_new_at_each_step_and_belong_to_the_batch(images):
    method = masked_method(regularizer=RegularizerConfig("sigreg", num_slices=4))
    views = drawn(images, 0)
    first, again, other = (loss_of_views(method, views, jr.key(k))[1]["train/sigreg_loss"] for k in (0, 0, 1))
    assert first == again != other


def test_targets_are_normalised_per_token(images):
    targets = outputs_of(masked_method(), drawn(images, 0)).embedded
    np.testing.assert_allclose(targets.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(targets.std(-1), 1.0, atol=1e-3)


def test_the_teacher_gets_no_gradient(images):
    grads = eqx.filter_jit(eqx.filter_grad(lambda m, v: loss_of_views(m, v, jr.key(0))[0]))(
        masked_method(), drawn(images, 0)
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads.target_encoder))
    assert all(np.any(leaf) for leaf in jax.tree.leaves((grads.encoder, grads.predictor)))


def test_the_norm_of_the_predictions_is_plain_or_trained():
    assert masked_method(prediction_norm="affine").prediction_norm is not None
    assert masked_method(prediction_norm="no_affine").prediction_norm is None


def test_the_loss_reads_no_label(images):
    method = masked_method()
    relabeled = eqx.tree_at(lambda i: i.label, images, images.label + 1)
    assert loss_of(method, images, jr.key(0))[0] == loss_of(method, relabeled, jr.key(0))[0]


def test_an_example_keeps_its_view_and_mask_in_any_batch(images):
    views, rows = drawn(images, 3), jnp.array([5, 2])
    some = drawn(jax.tree.map(lambda x: x[rows], images), 3)
    np.testing.assert_allclose(some.image, views.image[rows], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[rows], b), views.masks, some.masks)


def test_the_same_picture_at_two_places_of_the_order_gets_two_views_and_two_masks(images):
    alike = eqx.tree_at(lambda i: i.canvas, images, jnp.broadcast_to(images.canvas[:1], images.canvas.shape))
    alike = eqx.tree_at(lambda i: i.size, alike, jnp.broadcast_to(images.size[:1], images.size.shape))
    views = drawn(alike, 3)
    for part in (views.image, views.masks.context, views.masks.targets):
        assert len({np.asarray(row).tobytes() for row in part}) > len(part) // 2


def test_new_keys_give_new_views(images):
    views = [drawn(images, seed).image for seed in (0, 1)]
    assert jnp.abs(views[0] - views[1]).max() > 0.1


def test_the_teacher_moves_after_the_update():
    method = masked_method(ema=EMAConfig(start=0.5, end=0.5))
    method = eqx.tree_at(lambda m: m.encoder.norm.bias, method, method.encoder.norm.bias + 1.0)
    moved, metrics = method.after_update(jnp.int32(0), {})
    np.testing.assert_allclose(moved.target_encoder.average.norm.bias, 0.5)
    np.testing.assert_array_equal(moved.encoder.norm.bias, method.encoder.norm.bias)
    np.testing.assert_allclose(metrics["ema/update_norm"], 0.5 * np.sqrt(32), rtol=1e-5)


def test_the_target_encoder_is_evaluated_by_default():
    method = masked_method()
    assert next(iter(method.encoders().values())) is method.target_encoder.average
    assert method.encoders()["context"] is method.encoder


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"method\.smooth_l1_beta=0"):
        IJEPAConfig(smooth_l1_beta=0.0)
    with pytest.raises(UserError, match=r"regularizer.weight=-1"):
        RegularizerConfig("sigreg", weight=-1.0)
    with pytest.raises(UserError, match=r"regularizer.num_slices=0"):
        RegularizerConfig("sigreg", num_slices=0)
    with pytest.raises(UserError, match=r"method.ema.start=1.5"):
        EMAConfig(start=1.5)
    with pytest.raises(UserError, match=r"masks\.num_context_patches=40 cannot be met"):
        config = shrunk("ijepa_vitb16_in1k").method
        replace(config, masks=replace(config.masks, num_context_patches=40)).build(total_steps=1, key=jr.key(0))
