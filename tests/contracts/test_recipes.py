"""What every recipe must satisfy, whatever its method."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax import checkpoint, sharding
from jepax.data import open_source
from jepax.optim import OptimConfig, Optimizer
from jepax.recipes import RECIPES
from jepax.train import compiled_step, first_state, init_state, make_optimizer, read
from jepax.trees import EMA, trainable
from tests.contracts.shrink import BATCH, shrunk

STEPS = 6


@pytest.fixture(scope="module", params=sorted(RECIPES))
def config(request):
    return shrunk(request.param)


@pytest.fixture(scope="module")
def batches(config):
    return list(read(config, open_source(config.data, "train"), STEPS, 0))


def fresh(config, seed=None, devices=None):
    config = config if seed is None else replace(config, seed=seed)
    optimizer = make_optimizer(config, STEPS, 64)
    mesh = jax.make_mesh((devices or 1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                         devices=jax.devices()[: devices or 1])
    return mesh, optimizer, sharding.replicate(first_state(config, STEPS, optimizer), mesh)


def run(config, batches, devices):
    mesh, optimizer, state = fresh(config, devices=devices)
    root, losses = sharding.replicate(jr.key(1), mesh), []
    for images in batches[:3]:
        state, metrics = compiled_step((optimizer, sharding.shard_batch(images, mesh), root, jnp.float32), state)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.tree.map(np.asarray, eqx.filter(state, eqx.is_array))


def test_every_trained_parameter_gets_a_finite_gradient(config, batches):
    _, _, state = fresh(config)
    params, rest = eqx.partition(state.method, trainable(state.method))
    images = jax.tree.map(jnp.asarray, batches[0])

    @eqx.filter_jit
    def gradients(params):
        return jax.grad(lambda p: eqx.combine(p, rest).loss(images, key=jr.key(0))[0])(params)

    named = jax.tree_util.tree_leaves_with_path(gradients(params))
    assert named
    for path, grad in named:
        assert jnp.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert jnp.abs(grad).max() > 0, f"{jax.tree_util.keystr(path)} is not trained"


def test_a_teacher_has_no_gradient_and_no_optimiser_state(config):
    _, optimizer, state = fresh(config)
    params = eqx.filter(state.method, trainable(state.method))
    for teacher in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, EMA)):
        assert not isinstance(teacher, EMA) or not jax.tree.leaves(teacher)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * count


def test_one_batch_is_overfitted(config, batches):
    """Against a teacher that stands still, a hundred updates explain most of what the first could not."""
    method = config.method
    if hasattr(method, "momentum"):
        method = replace(method, momentum=replace(method.momentum, start=1.0, final=1.0))
    method = replace(method, crop=replace(method.crop, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0))
    optimizer = Optimizer(OptimConfig(peak_lr=3e-3, start_lr=3e-3, weight_decay=0.0, final_weight_decay=0.0), 150, 0)
    state = init_state(method.build(total_steps=150, key=jr.key(0)), optimizer)
    images, losses = jax.tree.map(jnp.asarray, batches[0]), []
    for _ in range(150):
        state, metrics = compiled_step((optimizer, images, jr.key(1), jnp.float32), state)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.5 * losses[0], losses[::15]


def test_eight_devices_equal_one(config, batches):
    (one, state_one), (eight, state_eight) = run(config, batches, 1), run(config, batches, 8)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state_one.method),
                            jax.tree.leaves(state_eight.method), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * max(np.abs(a).max(), 1e-2), err_msg=jax.tree_util.keystr(path))


def test_two_builds_compile_once(config, batches):
    counts, images = [], jax.tree.map(jnp.asarray, batches[0])
    for seed in (0, 1):
        _, optimizer, state = fresh(config, seed)
        compiled_step((optimizer, images, jr.key(seed), jnp.float32), state)
        counts.append(compiled_step._cached._cache_size())
    assert counts[0] == counts[1] > 0


def test_a_checkpoint_round_trips(config, batches, tmp_path):
    _, optimizer, state = fresh(config)
    images = jax.tree.map(jnp.asarray, batches[0])
    state, _ = compiled_step((optimizer, images, jr.key(1), jnp.float32), state)
    checkpoint.save(tmp_path, 1, state, keep=1)
    restored = checkpoint.restore(tmp_path, 1, fresh(config, seed=5)[2])
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, *(eqx.filter(tree, eqx.is_array) for tree in (state, restored)))


def test_the_batch_divides_over_the_devices(config):
    assert BATCH % jax.device_count() == 0
    sharding.check_batch(config.train.batch_size)
