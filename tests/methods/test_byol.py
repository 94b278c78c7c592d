"""BYOL: each view is compared with the others' teacher, which gets no gradient and follows."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.byol import BYOLConfig, cosine_distance, cosine_distance_of_mean
from jepax.methods.ema import EMAConfig
from jepax.methods.multiview import embed, project
from jepax.nn import ProjectorConfig
from jepax.types import UserError
from jepax.views import MultiCropConfig
from tests.methods.small import SHARED, drawn_by, loss_of
from tests.methods.test_multiview import CONFIGS

CONFIG = BYOLConfig(**SHARED, predictor=ProjectorConfig(hidden_dims=(24,), out_dim=8))


def test_byol_compares_each_view_with_the_others_teacher(groups):
    predictions, targets = (np.asarray(group, np.float64) for group in (jnp.concatenate(groups), groups[0] + 0.1))
    pairs = [(v, w) for v in range(5) for w in range(2) if v != w]
    cosines = [
        np.sum(predictions[v] * targets[w], axis=1)
        / np.linalg.norm(predictions[v], axis=1)
        / np.linalg.norm(targets[w], axis=1)
        for v, w in pairs
    ]
    expected = 2 - 2 * np.mean(cosines)
    np.testing.assert_allclose(cosine_distance(jnp.concatenate(groups), groups[0] + 0.1), expected, rtol=1e-5)
    np.testing.assert_allclose(cosine_distance(groups[0], groups[0][::-1]), 0.0, atol=1e-5)


def test_the_mean_explains_what_one_prediction_for_all_images_can(groups):
    targets = np.asarray(groups[0] + 0.1, np.float64)
    units = targets / np.linalg.norm(targets, axis=2, keepdims=True)
    mean = units.mean((0, 1)) / np.linalg.norm(units.mean((0, 1)))
    expected = 2 - 2 * np.mean(units @ mean)
    np.testing.assert_allclose(cosine_distance_of_mean(groups[0] + 0.1), expected, rtol=1e-5)
    everywhere = jnp.broadcast_to(jnp.asarray(mean, jnp.float32), groups[0].shape)
    np.testing.assert_allclose(cosine_distance(everywhere, groups[0] + 0.1), expected, rtol=1e-5)


@pytest.mark.long
def test_what_byol_logs_of_its_loss(images):
    method = CONFIG.build(total_steps=10, key=jr.key(0))
    loss, metrics = loss_of(method, images, jr.key(1))
    views = drawn_by(method, images, jr.key(1))
    projected = eqx.filter_jit(lambda method, views: project(method.projector, embed(method.encoder, views)))
    targets = projected(method, views.global_views)  # the averages begin equal
    lengths = np.linalg.norm(np.asarray(targets, np.float64), axis=2)
    np.testing.assert_allclose(metrics["health/target_norm"], lengths.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["projections"], targets[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        metrics["train/explained_variance"], 1 - loss / cosine_distance_of_mean(targets), rtol=1e-4
    )
    assert metrics["health/prediction_norm"] > 0


def test_projections_of_zero_have_a_loss_and_a_gradient(groups):
    """As a BatchNorm over one example leaves them."""
    loss, grad = jax.value_and_grad(cosine_distance)(groups[0] * 0, groups[0])
    assert loss == pytest.approx(2.0) and np.isfinite(grad).all()


def test_byols_teacher_gets_no_gradient_and_follows(images):
    config = replace(CONFIG, ema=EMAConfig(start=0.5, end=0.5))
    method = config.build(total_steps=10, key=jr.key(0))
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: m.loss(images, key=jr.key(1))[0]))(method)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads.target))
    assert all(np.any(leaf) for leaf in jax.tree.leaves((grads.encoder.stack, grads.projector, grads.predictor)))
    other = eqx.tree_at(lambda m: m.encoder.norm.bias, method, method.encoder.norm.bias + 1.0)
    moved, metrics = other.after_update(jnp.int32(0), {})
    np.testing.assert_allclose(moved.target.average[0].norm.bias, 0.5)
    assert metrics["ema/momentum"] == 0.5


def test_the_targets_are_the_averages(images):
    """Equal at first; another average makes another loss."""
    method = CONFIG.build(total_steps=10, key=jr.key(0))
    other = eqx.tree_at(lambda m: m.target.average[0].embed.weight, method, replace_fn=lambda w: -w)
    loss, moved = (float(loss_of(m, images, jr.key(1))[0]) for m in (method, other))
    assert abs(loss - moved) > 1e-3 * loss


def test_the_encoder_begins_as_that_of_the_other_methods():
    ours, theirs = (config.build(total_steps=10, key=jr.key(0)).encoder for config in (CONFIG, CONFIGS["lejepa"]))
    jax.tree.map(np.testing.assert_array_equal, *(eqx.filter(tree, eqx.is_array) for tree in (ours, theirs)))


def test_the_loss_reads_every_view_and_no_label(images):
    method = CONFIG.build(total_steps=10, key=jr.key(0))
    loss, metrics = loss_of(method, images, jr.key(1))
    assert 0 < loss < 4 and metrics["embeddings"].shape == (8, 32)
    relabeled = eqx.tree_at(lambda i: i.label, images, images.label + 1)
    assert loss == loss_of(method, relabeled, jr.key(1))[0]
    fewer = replace(CONFIG, views=replace(CONFIG.views, num_local=0)).build(total_steps=10, key=jr.key(0))
    assert loss != loss_of(fewer, images, jr.key(1))[0]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"method\.predictor\.out_dim=256"):
        BYOLConfig(**SHARED)
    with pytest.raises(UserError, match=r"predictor\.final_relu=True"):
        replace(CONFIG, predictor=replace(CONFIG.predictor, final_relu=True))
    assert BYOLConfig().projector.out_dim == 256  # the defaults fit each other
    with pytest.raises(UserError, match=r"method\.views.num_global=1"):
        replace(CONFIG, views=MultiCropConfig(num_global=1))
