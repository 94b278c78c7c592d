"""Fine-tuning trains a copy of the whole encoder, lower layers more slowly, and leaves the row as it was."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.evals.eval_dataset import EvalDataset, without_labels
from jepax.evals.feature_extractor import PixelFeatures, augmented
from jepax.evals.finetune import FinetuneConfig, finetune, make_task
from jepax.evals.head_training import init_heads, train_heads_step, train_on_images
from jepax.evals.scoring import ProtocolData, top1_accuracy
from jepax.types import UserError
from tests.evals.made import run
from tests.evals.textures import BATCH, CLASSES, CROP, arrays, majority, row, source, split

CONFIG = FinetuneConfig(epochs=8, batch_size=BATCH, learning_rates=(1e-6, 3e-3, 1e-7))
SHORT = replace(CONFIG, epochs=1, learning_rates=(1e-9, 2e-9))


def splits(frozen):
    return split(frozen, 200, 0), split(frozen, 57, 1)


@pytest.fixture(scope="module")
def fitted():
    before = arrays(row())
    (answer,) = run(finetune, *splits(row()), CLASSES, CONFIG, key=jr.key(0))
    return answer, before


def task_of(train, learning_rate, config, key=0):
    data = ProtocolData(train, train, CLASSES, jr.key(key))
    return make_task(data, learning_rate, config), data


def train_once(train, learning_rate):
    task, data = task_of(train, learning_rate, SHORT)
    return train_on_images(task, data, "fine-tuning")


def one_step(**changes):
    """The classifier before and after one step at learning rate 1e-2, and the step's batch and loss."""
    train, _ = splits(row())
    images = next(iter(train.shuffled(BATCH, 1, 0)))
    task, _ = task_of(train, 1e-2, replace(CONFIG, **changes))
    schedule = replace(task.schedule, total_steps=10, warmup_steps=1)  # the first step is at the peak
    task = replace(task, schedule=schedule)
    state = init_heads(task, jr.key(1))
    start = jax.tree.map(np.array, state.params)
    after, loss = train_heads_step(state, task, replace(images, label=None), images.label, jr.key(2))
    return start, jax.tree.map(np.array, after.params), images, loss


def changes(**settings):
    start, after, *_ = one_step(**settings)
    return jax.tree.map(lambda begin, end: end - begin, start, after)


def test_each_layer_has_its_share_of_the_learning_rate():
    decay = 0.5
    full, less = changes(layer_decay=1.0, weight_decay=0.0), changes(layer_decay=decay, weight_decay=0.0)

    def check(path, whole, part):
        names = [entry.name for entry in path]
        assert np.abs(whole).max() > 1e-4, names
        if "blocks" in names:
            share = (decay ** np.array([2.0, 1.0])).reshape(-1, *(whole.ndim - 1) * (1,))
        else:
            share = decay**3 if "embed" in names else 1.0
        np.testing.assert_allclose(part, share * whole, atol=2e-6, err_msg=str(names))

    jax.tree_util.tree_map_with_path(check, full, less)


def test_shares_of_a_deeper_stack_by_the_formula():
    task, _ = task_of(splits(row())[0], 1e-3, CONFIG)
    shares = task.lr_scale(init_heads(task, jr.key(0)).params)
    assert shares.head.weight == 1 and shares.encoder.norm.bias == 1
    assert shares.encoder.embed.weight == pytest.approx(0.75**3)
    np.testing.assert_allclose(shares.encoder.stack.blocks.mlp.fc1.weight.ravel(), [0.75**2, 0.75])


def test_with_a_tiny_decay_only_the_top_moves():
    moved = changes(layer_decay=1e-4, weight_decay=0.0)
    blocks = moved.encoder.stack.blocks.mlp.fc1.weight
    assert np.abs(moved.encoder.embed.weight).max() < 1e-10
    assert np.abs(blocks[0]).max() < 1e-9 < 1e-7 < np.abs(blocks[1]).max() < 1e-5
    assert np.abs(moved.head.weight).max() > 1e-3


def test_weights_decay_by_their_own_rate_and_nothing_else_does():
    task, _ = task_of(splits(row())[0], 1e-3, replace(CONFIG, layer_decay=0.5))
    start = init_heads(task, jr.key(1)).params
    kept, less = changes(weight_decay=0.0, layer_decay=0.5), changes(weight_decay=0.5, layer_decay=0.5)
    shares = task.lr_scale(start)

    def check(path, begin, share, without, with_decay):
        names = [entry.name for entry in path]
        is_decayed = names[-1] == "weight" and not any("norm" in name for name in names)
        expected = -1e-2 * share * 0.5 * begin if is_decayed else 0 * begin
        np.testing.assert_allclose(with_decay - without, expected, atol=1e-6, err_msg=str(names))

    jax.tree_util.tree_map_with_path(check, start, shares, kept, less)


def test_the_loss_is_cross_entropy_to_smoothed_labels_of_crops():
    smoothing = 0.3
    start, _, images, loss = one_step(label_smoothing=smoothing)
    start = jax.tree.map(jnp.asarray, start)
    crop = replace(CROP, scale=CONFIG.crop_scale, hflip_prob=CONFIG.hflip_prob)
    embed = jax.jit(lambda encoder, images, key: encoder(augmented(images, key, crop)))
    tokens = np.asarray(embed(start.encoder, replace(images, label=None), jr.key(2)), np.float64)
    logits = tokens.mean(axis=1) @ np.asarray(start.head.weight, np.float64)
    logged = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = (1 - smoothing) * np.eye(CLASSES)[images.label] + smoothing / CLASSES
    np.testing.assert_allclose(loss, -(target * logged).sum(axis=1).mean(), rtol=1e-6)


def test_it_learns_and_validation_chooses(fitted):
    answer, before = fitted
    tops = [tried["validation_top1"] for tried in answer.trials]
    assert [tried["learning_rate"] for tried in answer.trials] == [1e-6, 3e-3, 1e-7]
    assert (
        answer.settings is answer.trials[1]
        and tops[1] == max(tops) > max(tops[0], tops[2])
        and answer.variant == "lr 0.003"
    )
    test = split(row(), 70, 2)
    assert top1_accuracy(answer.predict(test), test.labels) > majority(test.labels) + 30
    _, validation = splits(row())
    assert top1_accuracy(answer.predict(validation), validation.labels) == tops[1]
    for old, new in zip(before, arrays(row()), strict=True):
        np.testing.assert_array_equal(old, new)  # the row's own encoder, and its arrays still live


@pytest.mark.long
def test_of_equals_the_first_is_chosen():
    (answer,) = run(finetune, *splits(row()), CLASSES, SHORT, key=jr.key(0))
    assert answer.trials[0]["validation_top1"] == answer.trials[1]["validation_top1"]
    assert answer.settings is answer.trials[0]


def test_labels_of_the_test_split_are_not_read(fitted):
    answer, _ = fitted
    pictures = source(70, 2)
    np.testing.assert_array_equal(
        answer.predict(EvalDataset(row(), pictures, BATCH)),
        answer.predict(EvalDataset(row(), without_labels(pictures), BATCH)),
    )


def test_one_program_for_every_learning_rate_and_every_row():
    first = train_once(splits(row())[0], 1e-3)
    before = train_heads_step._cache_size()
    second = train_once(splits(row(1))[0], 2e-3)
    assert train_heads_step._cache_size() == before
    assert np.abs(np.asarray(first.encoder.embed.weight - second.encoder.embed.weight)).max() > 1e-3
    again = train_once(splits(row())[0], 1e-3)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_what_cannot_be_trained_is_refused():
    pixels = PixelFeatures(CROP, 4)
    with pytest.raises(UserError, match="PixelFeatures"):
        run(finetune, *splits(pixels), CLASSES, CONFIG, key=jr.key(0))
    with pytest.raises(UserError, match="train"):
        run(finetune, *splits(row()), CLASSES - 1, CONFIG, key=jr.key(0))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, row())
    with pytest.raises(UserError, match="diverged"):
        run(finetune, split(broken, 9, 0), split(broken, 9, 1), CLASSES, SHORT, key=jr.key(0))
