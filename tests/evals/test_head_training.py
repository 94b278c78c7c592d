"""Crops depend on key and place alone, guesses stand for every example once, and AdamW is optax's."""

import contextlib
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jepax.evals import attentive, scoring
from jepax.evals.attentive import AttentiveConfig, AttentiveTask
from jepax.evals.checks import check_predictions
from jepax.evals.feature_extractor import augmented
from jepax.evals.finetune import FinetuneConfig
from jepax.evals.head_training import (
    HeadHparams,
    HeadTask,
    TrainSchedule,
    init_heads,
    loader_seed,
    train_cached_epoch,
    train_heads_step,
    train_on_images,
    warmup_schedule,
)
from jepax.evals.linear import LinearConfig
from jepax.evals.progress import Progress
from jepax.evals.scoring import NO_CLASS, ProtocolData, predict, topk
from jepax.nn.transformer import LayerNorm, Linear
from jepax.optim import weight_decay_mask
from jepax.types import ImageBatch, UserError
from jepax.views import center_crop
from tests.evals.textures import BATCH, CLASSES, CROP, SIDE, row, source, split


def batch(count=8):
    return next(iter(split(row(), count, 0).shuffled(count, 1, 0)))


cut = eqx.filter_jit(augmented)


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


def test_the_training_view_is_the_center_view_or_a_crop(monkeypatch):
    images, key, calls = batch(), jr.key(0), []
    center = center_crop(images, CROP)
    monkeypatch.setattr(attentive, "augmented", lambda *given: calls.append(given) or center + 1)
    for views, view, expected in (("center", center, []), ("augmented", center + 1, [(images, key, CROP)])):
        task = AttentiveTask(ONE, row(), STEPS, CLASSES, views, CROP)
        np.testing.assert_array_equal(task.inputs(images, key), row().tokens(view))
        assert calls == expected


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
    before = scoring._values._cache_size()
    for part in (few, many):
        mean = part.source.images.astype(np.float32).mean(axis=(1, 2))
        expected = topk(np.sin(np.asarray(weight) * mean))
        guesses = predict(Means(weight), part)
        assert guesses.shape == (len(part), 5)
        assert np.mean(guesses == expected) > 0.99  # float32 sines differ in the last place
    assert scoring._values._cache_size() == before + 1


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
        check_predictions(guesses, "attentive")
    check_predictions(predict(Means(jnp.array([jnp.nan, 1.0, 1.0])), part), "attentive")
    with pytest.raises(UserError, match="empty"):
        predict(Means(jnp.ones(3)), split(row(), 0, 0))


@pytest.mark.parametrize(("examples", "sizes"), [(100, (40, 7)), (40, (40, 3)), (7, (7, 3))])
def test_epochs_follow_without_a_break_and_a_batch_is_at_most_the_split(examples, sizes):
    schedule = warmup_schedule(3, 40, 0.1, examples)
    assert (schedule.batch_size, schedule.total_steps) == sizes


def test_the_rate_rises_then_falls_to_near_zero_and_no_step_is_lost():
    schedule = warmup_schedule(50, 10, 0.2, 10)
    values = np.array([schedule.factor(jnp.int32(step)) for step in range(50)])
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert values.argmax() == 9 and np.all(np.diff(values[9:]) < 0)
    assert 0 < values[-1] < 0.01
    assert replace(schedule, warmup_steps=0).factor(jnp.int32(0)) > 0.99
    assert warmup_schedule(1, 10, 0.2, 10).factor(jnp.int32(0)) > 0.4


def test_the_cosine_and_the_step_schedule():
    cosine = TrainSchedule("adamw", "cosine", 10, 5, 100)
    assert [round(float(cosine.factor(jnp.int32(step))), 6) for step in (0, 50, 100)] == [1, 0.5, 0]
    step = TrainSchedule("lars", "step", 10, 5, 200)
    assert [round(float(step.factor(jnp.int32(count))), 6) for count in (0, 74, 75, 149, 150)] == [1, 1, 0.1, 0.1, 0.01]


def test_the_order_follows_from_the_key():
    assert loader_seed(jr.key(0)) == loader_seed(jr.key(0)) != loader_seed(jr.key(1))
    assert 0 <= loader_seed(jr.key(0)) < 2**31


class Net(eqx.Module):
    norm: LayerNorm
    linear: Linear


class Sines(HeadTask):
    """A loss whose gradient is sin(w + batch) at every number, for each head."""

    hparams: HeadHparams
    schedule: TrainSchedule = eqx.field(static=True)

    def init(self, key):
        net = Net(LayerNorm(3), Linear(3, 2, std=1.0, key=jr.key(0)))
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), net)

    def inputs(self, batch, key):
        return batch

    def losses(self, params, inputs, labels):
        sums = [jnp.cos(leaf + inputs).reshape(2, -1).sum(1) for leaf in jax.tree.leaves(params)]
        return -sum(sums[1:], start=sums[0])


def test_updates_equal_optax_adamw_with_biases_and_norms_left_alone():
    """Each of two heads by its own learning rate and weight decay."""
    settings = [(0.03, 0.5), (0.01, 0.0)]
    hparams = HeadHparams(*np.asarray(settings, np.float32).T)
    task = Sines(hparams, TrainSchedule("adamw", "step", 1, 100, 100))
    start = jax.tree.map(np.array, init_heads(task, jr.key(0)).params)
    state, labels = init_heads(task, jr.key(0)), jnp.zeros(1, jnp.int32)
    for step in range(3):
        state, _ = train_heads_step(state, task, jnp.float32(step), labels, jr.key(0))
    ours = state.params
    for head, (rate, decay) in enumerate(settings):
        theirs = jax.tree.map(lambda leaf, head=head: jnp.asarray(leaf[head]), start)
        peer = optax.adamw(rate, weight_decay=decay, mask=weight_decay_mask)
        state = peer.init(theirs)
        for step in range(3):
            grads = jax.tree.map(lambda leaf, step=step: jnp.sin(leaf + step), theirs)
            updates, state = peer.update(grads, state, theirs)
            theirs = optax.apply_updates(theirs, updates)
        jax.tree.map(lambda a, b, head=head: np.testing.assert_allclose(a[head], b, rtol=1e-5, atol=1e-7), ours, theirs)


class Seen(HeadTask):
    """Moves the parameters of the examples that it is shown, at a constant rate."""

    hparams: HeadHparams
    schedule: TrainSchedule = eqx.field(static=True)

    def init(self, key):
        return {"seen": jnp.zeros(40)}

    def inputs(self, batch, key):
        assert not isinstance(batch, ImageBatch) or batch.label is None
        return batch.index if isinstance(batch, ImageBatch) else batch[0, :, 0].astype(jnp.int32)

    def losses(self, params, inputs, labels):
        return -jnp.sum(params["seen"][inputs])


ONE = HeadHparams(np.ones((), np.float32), np.zeros((), np.float32))
STEPS = TrainSchedule("lars", "step", batch_size=4, steps_per_epoch=2, total_steps=5)


def test_every_batch_of_images_is_one_step_and_is_counted():
    counts = []

    class Counting(Progress):
        @contextlib.contextmanager
        def bar(self, description, total):
            assert (description, total) == ("a title", 5)
            yield counts.append

    dataset = split(row(), 10, 0)
    data = ProtocolData(dataset, dataset, CLASSES, jr.key(0), Counting(print))
    moved = np.asarray(train_on_images(Seen(ONE, STEPS), data, "a title")["seen"]) > 0
    assert counts == [1, 2, 3, 4, 5]
    assert moved[:20].all() and not moved[20:].any()  # indices count over epochs


def test_an_epoch_over_cached_features_shows_each_example_once_but_those_of_an_incomplete_batch():
    features, labels, key = np.arange(10, dtype=np.float32)[None, :, None], np.zeros(10, np.int32), jr.key(0)
    for size, shown in ((5, 10), (4, 8)):
        task = Seen(ONE, replace(STEPS, batch_size=size, steps_per_epoch=10 // size))
        state = train_cached_epoch(init_heads(task, key), task, jnp.asarray(features), labels, key)
        assert (np.asarray(state.params["seen"]) > 0).sum() == shown


BAD = [
    ("epochs", 0),
    ("batch_size", 0),
    ("learning_rates", ()),
    ("learning_rates", (1e-3, 0.0)),
    ("crop_scale", (0.5, 0.3)),
    ("crop_scale", (0.0, 1.0)),
    ("hflip_prob", 1.5),
]
SWEEP = [("weight_decays", ()), ("weight_decays", (-0.1,))]
OWN = [*SWEEP, ("train_views", "left"), ("warmup_fraction", 1.0)]
OTHERS = [
    ("warmup_fraction", 1.0),
    ("layer_decay", 0.0),
    ("layer_decay", 1.1),
    ("weight_decay", -1.0),
    ("label_smoothing", 1.0),
]


@pytest.mark.parametrize(
    ("protocol", "make", "field", "value"),
    [("attentive", AttentiveConfig, *bad) for bad in BAD + OWN]
    + [("linear", LinearConfig, *bad) for bad in BAD + SWEEP]
    + [("finetune", FinetuneConfig, *bad) for bad in BAD + OTHERS],
)
def test_what_cannot_work_is_refused_by_name(protocol, make, field, value):
    if field == "train_views":
        with pytest.raises(Exception, match="train_views"):  # the type check may come first
            make(**{field: value})
        return
    with pytest.raises(UserError) as error:
        make(**{field: value})
    assert f"{protocol}.{field}={value!r}" in str(error.value)


def test_the_textures_are_learnable_and_balanced():
    made = source(200, 0)
    assert made.images.shape == (200, SIDE, SIDE, 1) and np.bincount(made.labels).min() > 200 / CLASSES / 2
