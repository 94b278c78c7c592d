"""What every recipe must satisfy, whatever its method."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.data import open_source
from jepax.distributed import sharding
from jepax.io import checkpoint
from jepax.recipes import RECIPES
from jepax.training.config import make_optimizer
from jepax.training.loop import train_batches
from jepax.training.step import TrainContext, first_state, jit_train_step, run_train_step
from jepax.trees import EMA, trainable
from jepax.types import ImageBatch
from jepax.views import ColorConfig
from tests.contracts.shrink import distinct

STEPS = 6
DISTINCT = distinct()
SIZES = {"ijepa_vitb16_in1k", "ijepa_fashion_mnist_multilayer", "lejepa_vitl14_in1k", "visreg_vitb16_in1k"}
"""Differ from another recipe of their method by sizes, layers and numbers of views: `make test-long` takes them."""
NAMES = [pytest.param(name, marks=[pytest.mark.long] * (name in SIZES)) for name in DISTINCT]


@pytest.fixture(scope="module", params=NAMES)
def config(request):
    yield DISTINCT[request.param]
    jax.clear_caches()  # the programs of all of them at once are more than a process may map


@pytest.fixture(scope="module")
def batches(config):
    return list(train_batches(config, open_source(config.data, "train"), STEPS, 0))


def fresh(config, seed=None, devices=None):
    config = config if seed is None else replace(config, seed=seed)
    optimizer = make_optimizer(config, STEPS, 64)
    mesh = jax.make_mesh(
        (devices or 1, 1),
        ("data", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: devices or 1],
    )
    return mesh, optimizer, sharding.replicate(first_state(config.method, optimizer, jr.key(config.seed)), mesh)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_program_at_its_full_size(name):
    """Traced with abstract shapes: sizes fit each other, and nothing is computed."""
    config = RECIPES[name]()
    pictures = np.zeros((8, 64, 64, config.method.encoder.channels), np.uint8)
    images = ImageBatch(canvas=pictures, size=np.full((8, 2), 64, np.int32), index=np.arange(8, dtype=np.int32))
    method = eqx.filter_eval_shape(lambda: config.method.build(total_steps=10, key=jr.key(0)))
    loss = eqx.filter_eval_shape(lambda method: method.loss(images, key=jr.key(0))[0], method)
    assert config.recipe == name and loss.shape == () and loss.dtype == jnp.float32


def seeing_the_whole(method):
    """The same method with views that are always the whole picture as it is."""

    def whole(crop):
        return replace(crop, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)

    if not hasattr(method, "views"):
        return replace(method, crop=whole(method.crop))
    views = method.views
    crops = {"global_crop": whole(views.global_crop), "local_crop": whole(views.local_crop)}
    return replace(method, views=replace(views, photometric=ColorConfig(), **crops))


@pytest.fixture(scope="module")
def standing_still(config):
    """Against a teacher that does not move, views that are the whole picture, and no decay; the recipe's optimiser."""
    method = seeing_the_whole(config.method)
    if hasattr(method, "momentum"):
        method = replace(method, momentum=replace(method.momentum, start=1.0, final=1.0))
    still = {"warmup_epochs": 0.0, "weight_decay": 0.0, "final_weight_decay": 0.0}
    return replace(config, method=method, optim=replace(config.optim, peak_lr=3e-3, final_lr=3e-3, **still))


@eqx.filter_jit
def loss_and_gradients(params, rest, images):
    return jax.value_and_grad(lambda p: eqx.combine(p, rest).loss(images, key=jr.key(0))[0])(params)


def named_gradients(config, images, devices=1):
    mesh, _, state = fresh(config, devices=devices)
    params, rest = eqx.partition(state.method, trainable(state.method))
    loss, grads = loss_and_gradients(params, rest, sharding.shard_batch(images, mesh))
    named = jax.tree_util.tree_leaves_with_path(grads)
    return float(loss), {jax.tree_util.keystr(path): np.asarray(grad) for path, grad in named}


ZERO = {
    "lejepa": {".encoder.norm.bias"},
    "rectified_lpjepa": {".encoder.norm.bias"},
    "visreg": {".encoder.norm.bias"},
    "vicreg": {".encoder.norm.bias", ".projector.linears[1].bias"},
    "byol": {".encoder.norm.bias", ".projector.linears[1].bias"},
}
"""Parameters that a method's loss cannot read: a BatchNorm, or statistics about the mean, take any shift away."""


def test_every_trained_parameter_gets_a_finite_gradient_and_eight_devices_give_the_same(config, batches):
    """The loss and the gradients, not parameters after Adam, which divides the noise of a zero gradient by itself."""
    loss, one = named_gradients(config, batches[0])
    largest = max(np.abs(grad).max() for grad in one.values())
    zero = ZERO.get(config.method.name, set())
    loss_of_all, together = named_gradients(config, batches[0], devices=8)
    assert loss_of_all == pytest.approx(loss, rel=1e-5)
    for name, grad in one.items():
        if name in zero:
            assert max(np.abs(grad).max(), np.abs(together[name]).max()) < 1e-6 * largest, name
            continue
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, f"{name} is not trained"
        tolerance = 1e-4 * max(np.abs(grad).max(), 1e-3 * largest)  # so that no parameter hides behind the others
        np.testing.assert_allclose(together[name], grad, atol=tolerance, err_msg=name)
    apart = np.sqrt(sum(np.square(together[name] - grad).sum() for name, grad in one.items()))
    whole = np.sqrt(sum(np.square(grad).sum() for grad in one.values()))
    assert apart <= 1e-5 * whole, f"{apart / whole:.1e}"


def test_a_teacher_has_no_gradient_and_no_optimiser_state(config):
    _, _, state = fresh(config)
    params = eqx.filter(state.method, trainable(state.method))
    for teacher in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, EMA)):
        assert not isinstance(teacher, EMA) or not jax.tree.leaves(teacher)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.ndim and "ns_coeffs" not in str(path)]
    kept = [name for name in names for moment in moments if moment.endswith(name)]
    assert len(kept) == len(moments) and set(kept) == names


def test_one_batch_is_overfitted(standing_still, batches):
    """A hundred and fifty updates, or fewer, explain most of what the first could not."""
    _, optimizer, state = fresh(standing_still)
    images, losses = jax.tree.map(jnp.asarray, batches[0]), []
    while len(losses) < 10 or np.mean(losses[-10:]) >= 0.5 * losses[0]:
        assert len(losses) < 150, losses[::15]
        state, metrics = run_train_step(TrainContext(optimizer, jr.key(1)), images, state)
        losses.append(float(metrics["loss"]))


def test_two_builds_compile_once(standing_still, batches):
    counts, images = [], jax.tree.map(jnp.asarray, batches[0])
    for seed in (0, 1):
        _, optimizer, state = fresh(standing_still, seed)
        run_train_step(TrainContext(optimizer, jr.key(seed)), images, state)
        counts.append(jit_train_step._cache_size())
    assert counts[0] == counts[1] > 0


def test_a_checkpoint_round_trips(standing_still, batches, tmp_path):
    _, optimizer, state = fresh(standing_still)
    images = jax.tree.map(jnp.asarray, batches[0])
    state, _ = run_train_step(TrainContext(optimizer, jr.key(1)), images, state)
    checkpoint.save(tmp_path, 1, state)
    restored = checkpoint.restore(tmp_path, 1, fresh(standing_still, seed=5)[2])
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, *(eqx.filter(tree, eqx.is_array) for tree in (state, restored)))
