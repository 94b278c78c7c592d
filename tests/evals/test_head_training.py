"""Crops depend on key and place alone, guesses stand for every example once, and AdamW is optax's."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jepax.evals import head_training
from jepax.evals.attentive import AttentiveConfig
from jepax.evals.finetune import FinetuneConfig
from jepax.evals.head_training import (
    ADAM,
    adamw_update,
    augment,
    batch_size_and_steps,
    check_any_prediction,
    loader_seed,
    lr_scale,
    make_train_view,
    predict,
    run_head_training,
)
from jepax.evals.scoring import NO_CLASS, topk_classes
from jepax.nn.transformer import LayerNorm, Linear
from jepax.optim import weight_decay_mask
from jepax.types import ImageBatch, UserError
from jepax.views import center_crop
from tests.evals.textures import BATCH, CLASSES, CROP, SIDE, row, source, split


def batch(count=8):
    return next(iter(split(row(), count, 0).shuffled(count, 1, 0)))


cut = eqx.filter_jit(augment)


def rows_of(images: ImageBatch, rows) -> ImageBatch:
    return jax.tree.map(lambda leaf: leaf[np.asarray(rows)], images)


def test_a_crop_follows_from_key_and_place_alone():
    images, key = batch(), jr.key(3)
    view = cut(images, key, CROP)
    order = [5, 2, 7, 0, 1, 3, 4, 6]
    np.testing.assert_allclose(cut(rows_of(images, order), key, CROP), view[jnp.array(order)], atol=1e-6)
    later = eqx.tree_at(lambda i: i.index, images, images.index + 8)
    for other in (cut(later, key, CROP), cut(images, jr.key(4), CROP)):
        assert np.abs(np.asarray(other - view)).max(axis=(1, 2, 3)).min() > 0.1


def test_the_training_view_reads_scale_and_flip_of_its_config(monkeypatch):
    images, key, crops = batch(), jr.key(0), []
    config = AttentiveConfig(scale=(0.1, 0.2), flip=1.0)
    centre = center_crop(images, CROP)
    monkeypatch.setattr(head_training, "augment", lambda images, key, crop: crops.append(crop) or centre + 1)
    np.testing.assert_array_equal(make_train_view("centre", images, key, CROP, config), centre)
    assert crops == []
    np.testing.assert_array_equal(make_train_view("augmented", images, key, CROP, config), centre + 1)
    assert crops == [replace(CROP, scale=(0.1, 0.2), flip=1.0)]


class Means(eqx.Module):
    """Values of the classes from the mean of the picture; refuses to run where labels could be read."""

    weight: jax.Array

    def __call__(self, images: ImageBatch):
        assert images.label is None
        mean = jnp.mean(jnp.asarray(images.canvas, jnp.float32), axis=(1, 2))
        return jnp.sin(self.weight[..., None, :] * mean)


def test_every_example_is_guessed_once_in_order():
    weight = jnp.array([1.0, 2.0, 3.0, 5.0, 7.0, 11.0])
    few, many = split(row(), 2 * BATCH + 5, 0), split(row(), BATCH, 1)
    before = head_training._predict_batch._cache_size()
    for part in (few, many):
        mean = part.source.pictures.astype(np.float32).mean(axis=(1, 2))
        expected = topk_classes(np.sin(np.asarray(weight) * mean))
        guesses = predict(Means(weight), part)
        assert guesses.shape == (len(part), 5)
        assert np.mean(guesses == expected) > 0.99  # float32 sines differ in the last place
    assert head_training._predict_batch._cache_size() == before + 1


def test_leading_axes_of_guesses_stay():
    part = split(row(), BATCH + 3, 0)
    weights = jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    both = predict(Means(weights), part)
    assert both.shape == (2, len(part), 3)
    for weight, guesses in zip(weights, both, strict=True):
        np.testing.assert_array_equal(guesses, predict(Means(weight), part))


def test_nothing_guessed_is_refused():
    part = split(row(), 3, 0)
    guesses = predict(Means(jnp.full(3, jnp.nan)), part)
    np.testing.assert_array_equal(guesses, NO_CLASS)
    with pytest.raises(UserError, match=r"attentive\.learning_rates"):
        check_any_prediction(guesses, "attentive")
    check_any_prediction(predict(Means(jnp.array([jnp.nan, 1.0, 1.0])), part), "attentive")
    with pytest.raises(UserError, match="empty"):
        predict(Means(jnp.ones(3)), split(row(), 0, 0))


def test_steps_lie_end_to_end_and_a_batch_is_at_most_the_split():
    config = AttentiveConfig(epochs=3, batch_size=40)
    assert batch_size_and_steps(config, 100) == (40, 7)
    assert batch_size_and_steps(config, 40) == (40, 3)
    assert batch_size_and_steps(config, 7) == (7, 3)


def test_the_rate_rises_then_falls_to_near_zero_and_no_step_is_lost():
    config = AttentiveConfig(warmup=0.2)
    values = np.array([lr_scale(config, jnp.int32(step), 50) for step in range(50)])
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert values.argmax() == 9 and np.all(np.diff(values[9:]) < 0)
    assert 0 < values[-1] < 0.01
    assert lr_scale(replace(config, warmup=0.0), jnp.int32(0), 50) > 0.99
    assert lr_scale(config, jnp.int32(0), 1) > 0.4


def test_the_order_follows_from_the_key():
    assert loader_seed(jr.key(0)) == loader_seed(jr.key(0)) != loader_seed(jr.key(1))
    assert 0 <= loader_seed(jr.key(0)) < 2**31


class Net(eqx.Module):
    norm: LayerNorm
    linear: Linear


def test_updates_equal_optax_adamw_with_biases_and_norms_left_alone():
    net = Net(LayerNorm(3), Linear(3, 2, std=1.0, key=jr.key(0)))
    peer = optax.adamw(0.03, weight_decay=0.5, mask=weight_decay_mask)
    ours, moments, theirs, state = net, ADAM.init(net), net, peer.init(net)
    rates = jax.tree.map(lambda _: 0.03, net)
    for step in range(3):
        grads = jax.tree.map(lambda leaf, step=step: jnp.sin(leaf + step), net)
        ours, moments = adamw_update(grads, moments, ours, rates, 0.5)
        updates, state = peer.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_every_batch_is_one_step():
    part, told = split(row(), 10, 0), []
    seen = run_head_training(
        lambda state, images: ([*state, images.index[0]], jnp.ones(())), [], part.shuffled(4, 5, 0), told.append
    )
    assert seen == [0, 4, 8, 12, 16] and told == [1, 2, 3, 4, 5]


BAD = [
    ("epochs", 0),
    ("batch_size", 0),
    ("learning_rates", ()),
    ("learning_rates", (1e-3, 0.0)),
    ("warmup", 1.0),
    ("scale", (0.5, 0.3)),
    ("scale", (0.0, 1.0)),
    ("flip", 1.5),
]
OWN = [("weight_decays", ()), ("weight_decays", (-0.1,)), ("views", "left")]
OTHERS = [("layer_decay", 0.0), ("layer_decay", 1.1), ("weight_decay", -1.0), ("label_smoothing", 1.0)]


@pytest.mark.parametrize(
    ("protocol", "make", "field", "value"),
    [("attentive", AttentiveConfig, *bad) for bad in BAD + OWN]
    + [("finetune", FinetuneConfig, *bad) for bad in BAD + OTHERS],
)
def test_what_cannot_work_is_refused_by_name(protocol, make, field, value):
    if field == "views":
        with pytest.raises(Exception, match="views"):  # the type check may come first
            make(**{field: value})
        return
    with pytest.raises(UserError) as error:
        make(**{field: value})
    assert f"{protocol}.{field}={value!r}" in str(error.value)


def test_the_textures_are_learnable_and_balanced():
    made = source(200, 0)
    assert made.pictures.shape == (200, SIDE, SIDE, 1) and np.bincount(made.labels).min() > 200 / CLASSES / 2
