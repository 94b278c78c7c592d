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
from jepax.io import config_yaml as configs
from jepax.methods.base import example_keys, objective_key
from jepax.methods.ema import EMAConfig
from jepax.nn.stack import StackConfig
from jepax.optim import Optimizer
from jepax.recipes import RECIPES
from jepax.training.setup import Setup
from jepax.training.step import jit_train_step, run_train_step
from jepax.trees import EMA, trainable
from jepax.views import ColorConfig, CropConfig
from tests.contracts.shrink import blank_batch, distinct, replace_all

STEPS = 6
DISTINCT = distinct()


def group(config):
    """A method, or all that scan their layers."""
    return "scanned" if configs.flatten(config.method).get("encoder.scan_layers") else config.method.name


FIRST = {group(config): name for name, config in reversed(DISTINCT.items())}
"""One recipe of each method, and one that scans; others differ by sizes and choices alone: `make test-long`."""
NAMES = [pytest.param(name, marks=[pytest.mark.long] * (name not in FIRST.values())) for name in DISTINCT]
QUICK = [FIRST[name] for name in ("ijepa", "lejepa")]
SOME = [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in DISTINCT]
"""With a teacher and masks, and with neither; the others in the long run."""


@pytest.fixture(scope="module", params=NAMES)
def config(request):
    yield DISTINCT[request.param]
    jax.clear_caches()  # the programs of all of them at once are more than a process may map


@pytest.fixture(scope="module")
def batches(config):
    return list(fresh(config)[0].batches())


def fresh(config, seed=None, devices=1):
    """The run's setup on so many devices, and its state before step 0."""
    config = config if seed is None else replace(config, seed=seed)
    plan = sharding.ShardingPlan(sharding.make_mesh(devices))
    setup = Setup(config, open_source(config.data, "train"), Optimizer(config.optim, STEPS, 0), plan)
    return setup, setup.init_state()


def step(setup, state, batch):
    return run_train_step(state, sharding.shard_batch(batch, setup.plan.mesh), setup.base_key, setup.context)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_program_at_its_full_size(name):
    """Traced with abstract shapes, the blocks by a scan: sizes fit each other, and nothing is computed."""
    config = RECIPES[name]()
    method = replace_all(config.method, StackConfig, lambda stack: replace(stack, scan_layers=True))
    built = eqx.filter_eval_shape(lambda: method.build(total_steps=10, key=jr.key(0)))
    loss = eqx.filter_eval_shape(lambda built: built.loss(blank_batch(config), key=jr.key(0))[0], built)
    assert config.recipe == name and loss.shape == () and loss.dtype == jnp.float32


def still(method):
    """The same method with views that are always the original image, and a teacher that does not move."""
    no_crop = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip_prob": 0.0}
    method = replace_all(method, CropConfig, lambda crop: replace(crop, **no_crop))
    method = replace_all(method, ColorConfig, lambda _: ColorConfig())
    return replace_all(method, EMAConfig, lambda ema: replace(ema, start=1.0, end=1.0))


@pytest.fixture(scope="module")
def standing_still(config):
    """Nothing moves but the trained parameters, and nothing decays; the recipe's optimizer."""
    constant = {"warmup_epochs": 0.0, "weight_decay": 0.0, "final_weight_decay": 0.0}
    optim = replace(config.optim, peak_lr=3e-3, final_lr=3e-3, **constant)
    return replace(config, method=still(config.method), optim=optim)


@eqx.filter_jit
def draw(method, batch):
    return method.draw(batch, example_keys(jr.key(0), batch.index))


def opened(method):
    """The method with other numbers for the weights that start at zero: such a gate hides all that is behind it."""

    def move(path, leaf):
        is_gate = jax.tree_util.keystr(path).endswith(".weight") and not np.any(leaf)
        return leaf + 0.3 * jr.normal(jr.key(3), leaf.shape) if is_gate else leaf

    params, rest = eqx.partition(method, trainable(method))
    return eqx.combine(jax.tree_util.tree_map_with_path(move, params), rest)


@eqx.filter_jit
def loss_and_gradients(params, rest, views):
    def loss(params):
        method = eqx.combine(params, rest)
        return method.objective(method.forward(views), key=objective_key(jr.key(0)))[0]

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def drawn(config, batches):
    """The method on one device, and its views of a batch."""
    setup, state = fresh(config)
    return opened(state.method), draw(state.method, sharding.shard_batch(batches[0], setup.plan.mesh))


def named_gradients(method, views):
    loss, grads = loss_and_gradients(*eqx.partition(method, trainable(method)), views)
    named = jax.tree_util.tree_leaves_with_path(grads)
    return float(loss), {jax.tree_util.keystr(path): np.asarray(grad) for path, grad in named}


def reads(method, views, name):
    """The loss changes with this parameter: a shift of it by numbers of order 1 is no rounding error."""

    def moved(path, leaf):
        shift = jr.normal(jr.key(7), leaf.shape) if jax.tree_util.keystr(path) == name else 0.0
        return leaf + shift

    params, rest = eqx.partition(method, trainable(method))
    before = loss_and_gradients(params, rest, views)[0]
    after = loss_and_gradients(jax.tree_util.tree_map_with_path(moved, params), rest, views)[0]
    return abs(float(after - before)) > 1e-4 * abs(float(before))


def test_every_trained_parameter_gets_a_finite_gradient(drawn):
    """A bias may have none if the loss cannot read it: a BatchNorm, or statistics about the mean, remove any shift."""
    grads = named_gradients(*drawn)[1]
    largest = max(np.abs(grad).max() for grad in grads.values())
    for name, grad in grads.items():
        if name.endswith(".bias") and np.abs(grad).max() < 1e-6 * largest:
            assert not reads(*drawn, name), f"{name} is read, but not trained"
        else:
            assert np.isfinite(grad).all() and np.abs(grad).max() > 0, f"{name} is not trained"


@pytest.mark.parametrize("config", SOME, indirect=True)
def test_eight_devices_give_the_same_views_loss_and_gradients(config, batches, drawn):
    """Gradients, not parameters after Adam, which divides the noise of a zero gradient by itself."""
    loss, one = named_gradients(*drawn)
    largest = max(np.abs(grad).max() for grad in one.values())
    setup, state = fresh(config, devices=8)
    views = draw(state.method, sharding.shard_batch(batches[0], setup.plan.mesh))
    for ours, theirs in zip(jax.tree.leaves(views), jax.tree.leaves(drawn[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    loss_of_all, together = named_gradients(opened(state.method), views)
    assert loss_of_all == pytest.approx(loss, rel=1e-5)

    # What rounding does to them: views that differ in their last bits. A BatchNorm of like images enlarges it.
    method, views = drawn
    rounded = named_gradients(method, jax.tree.map(last_bits, views))[1]
    for name, grad in one.items():  # so that no parameter hides behind the others
        tolerance = 5e-4 * max(np.abs(grad).max(), 1e-3 * largest) + 4 * np.abs(rounded[name] - grad).max()
        np.testing.assert_allclose(together[name], grad, atol=tolerance, err_msg=name)
    apart, rounding, whole = (norm(one, other) for other in (together, rounded, None))
    assert apart <= max(1e-5 * whole, 4 * rounding) and rounding < 1e-4 * whole, f"{apart / whole:.1e}"


def last_bits(x):
    """Numbers moved by one unit in the last place, up or down at random; whole numbers stay."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x * (1 + jnp.finfo(x.dtype).eps * jr.rademacher(jr.key(5), x.shape, x.dtype))


def norm(one, other):
    """Norm of the difference of two gradients, or of the first."""
    return np.sqrt(sum(np.square(grad - (0 if other is None else other[name])).sum() for name, grad in one.items()))


def test_the_loss_is_the_same_in_micro_batches(drawn, batches):
    """`forward` sees each example alone, and `draw` no network: what the trainer relies on where it splits a batch."""
    method, views = drawn
    assert all(len(leaf) == len(batches[0].index) for leaf in jax.tree.leaves(views))

    # The batch is split into quarters of every fourth example, each embedded apart from the others.
    @eqx.filter_jit
    def in_micro_batches(method, views):
        quarters = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, 4, *x.shape[1:]), 0, 1), views)
        outputs = jax.lax.map(method.forward, quarters)
        outputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), outputs)
        return method.objective(outputs, key=objective_key(jr.key(0)))[0]

    assert float(in_micro_batches(method, views)) == pytest.approx(named_gradients(method, views)[0], rel=1e-5)


def test_a_teacher_has_no_gradient_and_no_optimiser_state(config):
    _, state = fresh(config)
    params = eqx.filter(state.method, trainable(state.method))
    for teacher in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, EMA)):
        assert not isinstance(teacher, EMA) or not jax.tree.leaves(teacher)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.ndim and "ns_coeffs" not in str(path)]
    kept = [name for name in names for moment in moments if moment.endswith(name)]
    assert len(kept) == len(moments) and set(kept) == names


@pytest.mark.parametrize("config", SOME, indirect=True)
def test_one_batch_is_overfitted(standing_still, batches):
    """A hundred and fifty updates, or fewer, explain most of what the first could not."""
    setup, state = fresh(standing_still)
    losses = []
    while len(losses) < 10 or np.mean(losses[-10:]) >= 0.5 * losses[0]:
        assert len(losses) < 150, losses[::15]
        state, metrics = step(setup, state, batches[0])
        losses.append(float(metrics["train/loss"]))


@pytest.mark.parametrize("config", SOME, indirect=True)
def test_two_builds_compile_once(standing_still, batches):
    counts = []
    for seed in (0, 1):
        setup, state = fresh(standing_still, seed)
        step(setup, state, batches[0])
        counts.append(jit_train_step._cache_size())
    assert counts[0] == counts[1] > 0


def test_a_checkpoint_round_trips(config, tmp_path):
    state = jax.tree.map(lambda x: x + 0.5 if eqx.is_inexact_array(x) else x, fresh(config)[1])
    checkpoint.save(tmp_path, 1, state)
    restored = checkpoint.restore(tmp_path, 1, fresh(config, seed=5)[1])
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, *(eqx.filter(tree, eqx.is_array) for tree in (state, restored)))
