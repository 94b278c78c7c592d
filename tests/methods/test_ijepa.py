"""I-JEPA: its settings do what they say, and randomness belongs to the example."""

import warnings
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.data import iter_once, open_source
from jepax.methods.ema import EMAConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.methods.regularizer import RegularizerConfig
from jepax.objectives import covariance, variance
from jepax.types import UserError
from tests.contracts.shrink import shrunk


def build(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shrunk("ijepa_vitb16_in1k", **settings).method.build(total_steps=10, key=jr.key(0))


@pytest.fixture(scope="module")
def images():
    batch, _ = next(iter(iter_once(open_source(shrunk("ijepa_vitb16_in1k").data, "train"), 8)))
    return jax.tree.map(jnp.asarray, batch)


@eqx.filter_jit
def whole_loss(method, images, key):
    return method.loss(images, key=key)


@eqx.filter_jit
def loss_of(method, view, masks, key):
    return method.loss_of(view, masks, key=key)


@eqx.filter_jit
def predictions_of(method, view, masks):
    return method.predictions(method.encoder(view, masks.context), masks)


@eqx.filter_jit
def targets_of(method, view):
    return method.targets(view)


@eqx.filter_jit
def pooled_context(encoder, view, masks):
    return jnp.mean(encoder(view, masks.context), axis=1)  # one embedding per image


@eqx.filter_jit
def _drawn(config, sampler, images, key):
    return config.views_and_masks(images, sampler, key=key)


def drawn(images, seed):
    """Views and masks, which no setting of these tests changes: compiled once."""
    config = build().config
    return _drawn(config, config.sampler(), images, jr.key(seed))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "l2"},
        {"beta": 0.3},
        {"target_norm": "none"},
        {"prediction_norm": "trainable"},
        {"prediction_norm": "plain"},
        pytest.param({"prediction_norm": "both"}, marks=pytest.mark.long),
        {"layers": (1, 2)},
        pytest.param({"layers": (1,)}, marks=pytest.mark.long),
        {"layers": (1, 2), "layer_weights": (1.0, 3.0)},
        {"context_weight": 0.5},
        {"regulariser": RegularizerConfig("vicreg")},
        pytest.param({"regulariser": RegularizerConfig("visreg", directions=8)}, marks=pytest.mark.long),
        pytest.param({"regulariser": RegularizerConfig("sigreg", directions=8)}, marks=pytest.mark.long),
        {"regulariser": RegularizerConfig("rdmreg", directions=8)},
    ],
)
def test_each_setting_changes_the_loss_and_stays_finite(images, settings):
    plain, other = (float(loss_of(build(**s), *drawn(images, 0), jr.key(0))[0]) for s in ({}, settings))
    assert np.isfinite(other)
    # The trainable norm begins as the plain one does.
    assert abs(plain - other) > 1e-6 * abs(plain)


def test_two_norms_on_the_predictions_are_allowed_with_a_warning():
    with pytest.warns(UserWarning, match="unstable"):
        IJEPAConfig(prediction_norm="both")
    assert build(prediction_norm="both").prediction_norm is not None
    assert build(prediction_norm="plain").prediction_norm is None


def test_a_regulariser_adds_its_weighted_value_of_the_pooled_context(images):
    chosen = RegularizerConfig("vicreg", weight=0.5, variance=3.0, covariance=0.25)
    method = build(regulariser=chosen)
    loss, metrics = whole_loss(method, images, jr.key(0))
    view, masks = drawn(images, 0)
    pooled = pooled_context(method.encoder, view, masks)
    np.testing.assert_allclose(metrics["variance_loss"], variance(pooled), rtol=1e-3)
    np.testing.assert_allclose(metrics["covariance_loss"], covariance(pooled), rtol=1e-3)
    weighted = 0.5 * (3.0 * metrics["variance_loss"] + 0.25 * metrics["covariance_loss"])
    assert weighted > 0
    np.testing.assert_allclose(loss, metrics["prediction_loss"] + weighted, rtol=1e-6)
    plain, metrics = loss_of(build(), view, masks, jr.key(0))
    np.testing.assert_allclose([plain, metrics["prediction_loss"]], loss - weighted, rtol=1e-5)
    assert "variance_loss" not in metrics and "covariance_loss" not in metrics


def test_layers_are_those_blocks_outputs_and_their_losses_are_weighed(images):
    view, masks = drawn(images, 0)
    single = {layers: targets_of(build(layers=layers), view) for layers in ((1,), (2,), (1, 2), (2, 1))}
    np.testing.assert_allclose(single[1, 2], jnp.concatenate([single[1,], single[2,]]), atol=1e-5)
    np.testing.assert_allclose(single[2, 1], jnp.concatenate([single[2,], single[1,]]), atol=1e-5)
    np.testing.assert_allclose(single[2,], targets_of(build(), view), atol=1e-5)  # None: the last alone
    assert jnp.abs(single[1,] - single[2,]).max() > 0.01

    def loss_with(weights):
        return float(loss_of(build(layers=(1, 2), layer_weights=weights), view, masks, jr.key(0))[0])

    first, second, mixed = loss_with((2.0, 0.0)), loss_with((0.0, 1.0)), loss_with((3.0, 1.0))
    np.testing.assert_allclose(mixed, (3 * first + second) / 4, rtol=1e-5)
    assert abs(first - second) > 1e-4


def test_what_is_read_for_collapse_is_the_deepest_layer_whatever_the_order(images):
    drawing = drawn(images, 0)
    ranks = [loss_of(build(layers=layers), *drawing, jr.key(0))[1]["embeddings"] for layers in ((1, 2), (2, 1))]
    np.testing.assert_allclose(*ranks, atol=1e-5)


@pytest.mark.parametrize("settings", [{"layers": (2, 1), "layer_weights": (3.0, 1.0)}, {"target_norm": "none"}])
def test_norms_of_tokens_and_the_share_explained_are_those_of_their_equations(settings, images):
    """Token by token in float64; the mean of the batch is taken per position, and the norms at the deepest layer."""
    method = build(**settings)
    view, masks = drawn(images, 0)
    metrics = loss_of(method, view, masks, jr.key(0))[1]
    targets = np.asarray(targets_of(method, view), np.float64)
    predictions = np.asarray(predictions_of(method, view, masks)[0], np.float64)

    def smooth_l1(error):
        return np.mean(np.where(error < 1, 0.5 * error**2, error - 0.5))

    places = [tuple(place) for place in np.argwhere(np.asarray(masks.target_valid))]
    losses, of_means, norms = np.zeros(len(targets)), np.zeros(len(targets)), []
    for image, block, place in places:
        patch = int(masks.targets[image, block, place])
        for layer in range(len(targets)):
            target, prediction = targets[layer, image, patch], predictions[layer, image, block, place]
            losses[layer] += smooth_l1(np.abs(prediction - target))
            of_means[layer] += smooth_l1(np.abs(targets[layer, :, patch].mean(0) - target))
        norms.append([np.linalg.norm(x) for x in (targets[0, image, patch], predictions[0, image, block, place])])
    weights = np.array(settings.get("layer_weights", (1.0,)))
    np.testing.assert_allclose(metrics["loss_explained"], 1 - losses @ weights / (of_means @ weights), rtol=1e-5)
    expected = np.mean(norms, axis=0)
    np.testing.assert_allclose([metrics["target_norm"], metrics["prediction_norm"]], expected, rtol=1e-5)


def test_the_context_loss_is_that_of_its_equation(images):
    method = build(context_weight=0.5)
    view, masks = drawn(images, 0)
    loss, metrics = loss_of(method, view, masks, jr.key(0))
    targets, rows = np.asarray(targets_of(method, view)[0]), method.masks.grid[1]
    predictions = np.asarray(predictions_of(method, view, masks)[1][0])
    total, count = 0.0, 0
    for image in range(8):
        for block in range(masks.targets.shape[1]):
            hidden = masks.targets[image, block][masks.target_valid[image, block]]
            for place, patch in enumerate(np.asarray(masks.context[image])):
                near = min(np.hypot(patch // rows - h // rows, patch % rows - h % rows) for h in np.asarray(hidden))
                error = np.abs(predictions[image, block, place] - targets[image, patch])
                total += np.mean(np.where(error < 1, 0.5 * error**2, error - 0.5)) / np.sqrt(near)
                count += 1
    np.testing.assert_allclose(metrics["context_loss"], total / count, rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["prediction_loss"] + 0.5 * metrics["context_loss"], rtol=1e-6)


@pytest.mark.parametrize("teacher", ["ema", "stopped", "shared"])
def test_only_a_shared_encoder_learns_from_its_targets(images, teacher):
    method = build(teacher=teacher, regulariser=RegularizerConfig("sigreg", directions=8))
    view, _ = drawn(images, 0)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: jnp.sum(jnp.square(m.targets(view)[..., :3]))))(method)
    reached = any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert reached == (teacher == "shared")
    moved, metrics = method.after_update(jnp.int32(0))
    assert ("momentum" in metrics) == (moved.target_encoder is not None) == (teacher == "ema")
    assert list(method.encoders()) == (["target", "context"] if teacher == "ema" else ["context"])


def test_a_shared_encoders_targets_can_be_regularised_instead(images):
    chosen = {"teacher": "shared", "target_norm": "none", "regulariser": RegularizerConfig("vicreg")}
    method = build(**chosen, regularised="targets")
    view, masks = drawn(images, 0)
    _, metrics = loss_of(method, view, masks, jr.key(0))
    pooled = jnp.mean(method.encoder(view), axis=1)
    np.testing.assert_allclose(metrics["variance_loss"], variance(pooled), rtol=1e-4)
    assert metrics["variance_loss"] != loss_of(build(**chosen), view, masks, jr.key(0))[1]["variance_loss"]
    with pytest.raises(UserError, match=r"method\.regularised=targets has no effect with method\.teacher=stopped"):
        IJEPAConfig(teacher="stopped", regularised="targets")


def test_directions_are_new_at_each_step_and_belong_to_the_batch(images):
    method = build(regulariser=RegularizerConfig("sigreg", directions=4))
    view, masks = drawn(images, 0)
    first, again, other = (loss_of(method, view, masks, jr.key(k))[1]["sigreg_loss"] for k in (0, 0, 1))
    assert first == again != other


def test_targets_are_normalised_per_token(images):
    method = build()
    targets = targets_of(method, jr.normal(jr.key(0), (2, 24, 24, 3)))
    np.testing.assert_allclose(targets.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(targets.std(-1), 1.0, atol=1e-3)


def test_the_loss_reads_no_label(images):
    method = build()
    relabelled = eqx.tree_at(lambda i: i.label, images, images.label + 1)
    assert whole_loss(method, images, jr.key(0))[0] == whole_loss(method, relabelled, jr.key(0))[0]


def test_an_example_keeps_its_view_and_mask_in_any_batch(images):
    view, masks = drawn(images, 3)
    some = jax.tree.map(lambda x: x[jnp.array([5, 2])], images)
    view_some, masks_some = drawn(some, 3)
    np.testing.assert_allclose(view_some, view[jnp.array([5, 2])], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[jnp.array([5, 2])], b), masks, masks_some)


def test_the_same_picture_at_two_places_of_the_order_gets_two_views_and_two_masks(images):
    alike = eqx.tree_at(lambda i: i.canvas, images, jnp.broadcast_to(images.canvas[:1], images.canvas.shape))
    alike = eqx.tree_at(lambda i: i.size, alike, jnp.broadcast_to(images.size[:1], images.size.shape))
    view, masks = drawn(alike, 3)
    for part in (view, masks.context, masks.targets):
        assert len({np.asarray(row).tobytes() for row in part}) > len(part) // 2


def test_new_keys_give_new_views(images):
    views = [drawn(images, seed)[0] for seed in (0, 1)]
    assert jnp.abs(views[0] - views[1]).max() > 0.1


def test_the_teacher_moves_after_the_update():
    method = build(momentum=EMAConfig(start=0.5, final=0.5))
    method = eqx.tree_at(lambda m: m.encoder.norm.bias, method, method.encoder.norm.bias + 1.0)
    moved, metrics = method.after_update(jnp.int32(0))
    np.testing.assert_allclose(moved.target_encoder.average.norm.bias, 0.5)
    np.testing.assert_array_equal(moved.encoder.norm.bias, method.encoder.norm.bias)
    np.testing.assert_allclose(metrics["ema_step_norm"], 0.5 * np.sqrt(32), rtol=1e-5)


def test_the_target_encoder_is_evaluated_by_default():
    method = build()
    assert next(iter(method.encoders().values())) is method.target_encoder.average
    assert method.encoders()["context"] is method.encoder


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"method\.beta=0"):
        IJEPAConfig(beta=0.0)
    for settings, words in (
        ({"context_weight": -1.0}, r"method.context_weight=-1"),
        ({"layers": (0,)}, r"method.layers=\(0,\) must name blocks from 1 to encoder.depth=12"),
        ({"layers": ()}, r"method.layers=\(\)"),
        ({"layers": (2, 2)}, "twice"),
        ({"layer_weights": (1.0, 2.0)}, r"method.layer_weights=\(1.0, 2.0\).*method.layers=\(12,\)"),
        ({"layers": (1, 2), "layer_weights": (0.0, 0.0)}, "one above"),
    ):
        with pytest.raises(UserError, match=words):
            IJEPAConfig(**settings)
    with pytest.warns(UserWarning, match="collapse"):
        IJEPAConfig(teacher="shared")
    with pytest.raises(UserError, match=r"regulariser.weight=-1"):
        RegularizerConfig("sigreg", weight=-1.0)
    with pytest.raises(UserError, match=r"regulariser.directions=0"):
        RegularizerConfig("sigreg", directions=0)
    with pytest.raises(UserError, match=r"method.momentum.start=1.5"):
        EMAConfig(start=1.5)
    with pytest.raises(UserError, match=r"masks\.context=40 cannot be met"):
        config = shrunk("ijepa_vitb16_in1k").method
        replace(config, masks=replace(config.masks, context=40)).build(total_steps=1, key=jr.key(0))
