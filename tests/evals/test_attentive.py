"""The attentive head is the published one, and a sweep of heads trains each as if it were alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.special import erf, softmax

from jepax.evals.attentive import AttentiveConfig, AttentiveHead, attentive, choose_num_heads, make_task
from jepax.evals.eval_dataset import EvalDataset, without_labels
from jepax.evals.feature_extractor import PixelFeatures
from jepax.evals.head_training import init_heads, loader_seed, train_heads_step, train_on_images
from jepax.evals.scoring import ProtocolData, top1_accuracy
from jepax.types import UserError
from tests.evals.made import run
from tests.evals.textures import BATCH, CLASSES, CROP, arrays, majority, row, source, split

CONFIG = AttentiveConfig(epochs=8, batch_size=BATCH, learning_rates=(1e-5, 3e-3), weight_decays=(0.0, 0.1))
SHORT = replace(CONFIG, epochs=1)
SETTINGS = [(1e-3, 0.0), (3e-3, 0.1), (1e-2, 0.0)]


def splits(frozen):
    return split(frozen, 200, 0), split(frozen, 57, 1)


def train_heads(train, settings):
    data = ProtocolData(train, train, CLASSES, jr.key(0))
    return train_on_images(make_task(data, settings, SHORT), data, "attentive probe")


@pytest.fixture(scope="module")
def fitted():
    before = arrays(row())
    (answer,) = run(attentive, *splits(row()), CLASSES, CONFIG, key=jr.key(0))
    return answer, before


def numpy_logits(head, tokens):
    """The published definition in float64: keys and values of every token, one query."""
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), head)

    def norm(layer, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer.weight + layer.bias

    def linear(layer, x):
        return x @ layer.weight + (0 if layer.bias is None else layer.bias)

    x = norm(head.norm1, np.asarray(tokens, np.float64))
    query, keys, values = linear(head.query_proj, head.query), linear(head.keys, x), linear(head.values, x)
    query, keys, values = (part.reshape(*part.shape[:-1], head.heads, -1) for part in (query, keys, values))
    scores = np.einsum("hc,bphc->bhp", query, keys) / np.sqrt(query.shape[-1])
    mixed = np.einsum("bhp,bphc->bhc", softmax(scores, axis=2), values).reshape(len(x), -1)
    read = head.query + linear(head.project, mixed)
    hidden = linear(head.mlp.fc1, norm(head.norm2, read))
    gelu = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    return linear(head.classify, read + linear(head.mlp.fc2, gelu))


def test_logits_equal_the_definition():
    head = AttentiveHead(128, 5, key=jr.key(0))
    leaves, tree = jax.tree.flatten(head)
    keys = jr.split(jr.key(1), len(leaves))
    drawn = [leaf + 0.3 * jr.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    head = jax.tree.unflatten(tree, drawn)  # biases and norms are not what they begin as
    tokens = 2 * jr.normal(jr.key(2), (3, 7, 128)) + 1
    assert head.heads == 2
    expected = numpy_logits(head, tokens)
    np.testing.assert_allclose(
        jax.jit(lambda h, t: h(t))(head, tokens), expected, rtol=1e-4, atol=1e-4 * expected.std()
    )


@pytest.mark.parametrize(
    ("dim", "heads"), [(192, 3), (768, 12), (1280, 20), (32, 1), (49, 1), (147, 3), (96, 2), (1, 1), (131, 1)]
)
def test_attention_heads_are_about_64_wide(dim, heads):
    assert choose_num_heads(dim) == heads


@pytest.mark.long
def test_together_is_alone():
    train, _ = splits(row())
    together = train_heads(train, SETTINGS)
    for number in range(len(SETTINGS)):
        alone = train_heads(train, SETTINGS[number : number + 1])
        for one, all_of_them in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(one[0], all_of_them[number], atol=1e-4)
    spread = np.abs(np.asarray(together.classify.weight[1:] - together.classify.weight[:1]))
    assert spread.max(axis=(1, 2)).min() > 3e-3  # the settings matter


def inputs_of_a_step(settings, config):
    train, _ = splits(row())
    images = next(iter(train.shuffled(BATCH, 1, loader_seed(jr.key(0)))))
    task = make_task(ProtocolData(train, train, CLASSES, jr.key(0)), settings, config)
    task = replace(task, schedule=replace(task.schedule, total_steps=10, warmup_steps=1))
    return init_heads(task, jr.key(1)), task, replace(images, label=None), images.label, jr.key(2)


@pytest.fixture(scope="module")
def stepped():
    """Two heads, the second with weight decay, before and after one step at learning rate 1e-2, and their losses."""
    state, *inputs = inputs_of_a_step([(1e-2, 0.0), (1e-2, 0.5)], CONFIG)
    start = jax.tree.map(np.array, state.params)
    after, losses = train_heads_step(state, *inputs)
    return start, jax.tree.map(np.array, after.params), losses


def test_weights_decay_and_nothing_else(stepped):
    decayed = {"query_proj", "keys", "values", "project", "mlp", "classify"}

    def check(path, begin, end):
        names = [entry.name for entry in path]
        expected = -1e-2 * 0.5 * begin[1] if names[0] in decayed and names[-1] == "weight" else 0 * begin[1]
        np.testing.assert_allclose(end[1] - end[0], expected, atol=1e-6)

    jax.tree_util.tree_map_with_path(check, *stepped[:2])


def test_heads_begin_alike_and_every_array_of_theirs_is_trained(stepped):
    start, after, losses = stepped
    np.testing.assert_array_equal(losses[0], losses[1])
    jax.tree.map(lambda begin: np.testing.assert_array_equal(begin[0], begin[1]), start)
    moved = jax.tree.map(lambda begin, end: np.abs(end[0] - begin[0]).max(), start, after)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("train_views", ["center", "augmented"])
def test_only_augmented_views_draw_random_numbers(train_views):
    program = jax.make_jaxpr(train_heads_step.__wrapped__)(
        *inputs_of_a_step([(1e-3, 0.0)], replace(CONFIG, train_views=train_views))
    )
    assert ("random_bits" in str(program)) == (train_views == "augmented")


def test_it_learns_and_validation_chooses(fitted):
    answer, before = fitted
    tops = [tried["validation_top1"] for tried in answer.trials]
    assert len(tops) == 4 and answer.settings["validation_top1"] == max(tops)
    assert answer.settings is answer.trials[int(np.argmax(tops))]
    assert answer.settings["learning_rate"] == 3e-3 and "lr 0.003" in answer.variant
    test = split(row(), 70, 2)
    assert top1_accuracy(answer.predict(test), test.labels) > majority(test.labels) + 30
    _, validation = splits(row())
    assert top1_accuracy(answer.predict(validation), validation.labels) == max(tops)
    for old, new in zip(before, arrays(row()), strict=True):
        np.testing.assert_array_equal(old, new)  # the encoder


def test_labels_of_the_test_split_are_not_read(fitted):
    answer, _ = fitted
    pictures = source(70, 2)
    np.testing.assert_array_equal(
        answer.predict(EvalDataset(row(), pictures, BATCH)),
        answer.predict(EvalDataset(row(), without_labels(pictures), BATCH)),
    )


@pytest.mark.long
def test_one_program_for_all_rows_of_one_shape():
    train, other = (split(row(seed), 200, 0) for seed in (0, 1))
    first = train_heads(train, SETTINGS)
    before = train_heads_step._cache_size()
    second = train_heads(other, SETTINGS)
    assert train_heads_step._cache_size() == before
    assert np.abs(np.asarray(first.classify.weight - second.classify.weight)).max() > 1e-3
    again = train_heads(train, SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_pixels_have_tokens_too():
    pixels = PixelFeatures(CROP, 4)
    config = replace(CONFIG, train_views="center", learning_rates=(3e-3,), weight_decays=(0.0,))
    train, validation = splits(pixels)
    (answer,) = run(attentive, train, validation, CLASSES, config, key=jr.key(0))
    assert answer.settings["validation_top1"] > majority(validation.labels) + 30


def test_a_split_smaller_than_a_batch_and_what_is_refused():
    train, validation = split(row(), 9, 0), split(row(), 9, 1)
    config = AttentiveConfig(epochs=2, learning_rates=(1e-3,), weight_decays=(0.0,))
    assert len(run(attentive, train, validation, CLASSES, config, key=jr.key(0))) == 1
    with pytest.raises(UserError, match="validation"):
        run(attentive, train, split(row(), 0, 0), CLASSES, config, key=jr.key(0))
    with pytest.raises(UserError, match="train"):
        run(attentive, train, validation, CLASSES - 1, config, key=jr.key(0))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, row())
    with pytest.raises(UserError, match="diverged"):
        run(attentive, split(broken, 9, 0), split(broken, 9, 1), CLASSES, config, key=jr.key(0))
