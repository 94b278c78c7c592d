"""The contract holds for a method on sequences of vectors: nothing in it is about images."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods import MethodConfig
from jepax.methods.base import example_keys, objective_key
from jepax.trees import trainable
from tests.methods.toy import ToyConfig, toy_batch

CONFIG = ToyConfig().tiny()


@pytest.fixture(scope="module")
def method():
    return CONFIG.build(total_steps=10, key=jr.key(0))


@eqx.filter_jit
def loss_and_gradients(method, batch, key):
    params, rest = eqx.partition(method, trainable(method))
    return jax.value_and_grad(lambda p: eqx.combine(p, rest).loss(batch, key=key), has_aux=True)(params)


def test_it_is_found_by_its_name_and_reads_any_source():
    assert MethodConfig.registry["toy_dynamics"] is ToyConfig
    CONFIG.check_data(object())


def test_every_parameter_but_the_teachers_has_a_gradient(method):
    (loss, metrics), grads = loss_and_gradients(method, toy_batch(16), jr.key(1))
    np.testing.assert_allclose(loss, metrics["train/prediction_loss"] + metrics["train/variance_loss"], rtol=1e-6)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads)) and jax.tree.leaves(grads.target_encoder) == []
    assert len(jax.tree.leaves(grads)) == 4


def test_an_examples_draw_belongs_to_its_index(method):
    batch, key = toy_batch(8, start=4), jr.key(2)
    all_views = method.draw(batch, example_keys(key, batch.index))
    rows = jnp.array([5, 2])
    some = method.draw(jax.tree.map(lambda x: x[rows], batch), example_keys(key, batch.index[rows]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[rows], b, rtol=1e-6), all_views, some)


def test_micro_batches_give_the_same_loss(method):
    batch, key = toy_batch(16), jr.key(3)
    views = method.draw(batch, example_keys(key, batch.index))
    parts = [method.forward(jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], views)) for i in range(4)]
    outputs = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    loss, _ = method.objective(outputs, key=objective_key(key))
    np.testing.assert_allclose(loss, method.loss(batch, key=key)[0], rtol=1e-5)


def test_a_plain_loop_learns_and_the_teacher_follows(method):
    batch = toy_batch(64)
    first, state = None, method
    for step in range(60):
        (loss, metrics), grads = loss_and_gradients(state, batch, jr.fold_in(jr.key(4), step))
        first = loss if first is None else first
        state = eqx.apply_updates(state, jax.tree.map(lambda g: -0.3 * g, grads))
        state, metrics = state.after_update(jnp.int32(0), metrics)
    assert loss < 0.7 * first and metrics["ema/momentum"] == pytest.approx(0.9)
    assert np.abs(state.target_encoder.average.weight - method.target_encoder.average.weight).max() > 0.01
