"""bfloat16 in matrix products: what stays in float32, and that training is the same but for rounding."""

from collections import Counter
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.distributed import sharding
from jepax.io import logger
from jepax.training.loop import train
from jepax.training.setup import make_setup
from jepax.training.step import TrainContext, loss_and_grads, run_train_step
from tests.contracts.shrink import shrunk

STEPS = 60


def products(name, compute):
    """Types of the operands of every matrix product of loss and gradient, and how many there are of each."""
    setup = make_setup(shrunk(name))
    context = TrainContext(setup.optimizer, compute)
    method = setup.config.method.build(total_steps=STEPS, key=jr.key(0))
    (images,) = setup.batches(steps=1)
    traced = eqx.filter_make_jaxpr(lambda m, i: loss_and_grads(m, i, jr.key(0), context))(method, images)[0]
    return Counter(found(traced.jaxpr))


def found(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield "x".join(sorted(variable.aval.dtype.name for variable in equation.invars))
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from found(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(("name", "kept"), [("ijepa_fashion_mnist", 5), ("lejepa_fashion_mnist", 5)])
def test_matrix_products_are_in_bfloat16_but_for_views_and_objectives(name, kept):
    """Crops: two products. Objectives: a covariance, or projections on directions, there and back."""
    whole, half = products(name, jnp.float32), products(name, jnp.bfloat16)
    assert set(whole) == {"float32xfloat32"}
    assert half["float32xfloat32"] == kept
    assert "bfloat16xfloat32" not in half and half.total() == whole.total()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in both types: the lines of its log, and the state."""
    config = shrunk("ijepa_fashion_mnist")
    config = replace(config, eval=replace(config.eval, online=replace(config.eval.online, every_steps=0)))
    folder = tmp_path_factory.mktemp("runs")
    ended = {}
    for name in ("float32", "bfloat16"):
        changed = replace(config, train=replace(config.train, steps=STEPS, log_every_steps=5, compute_dtype=name))
        ended[name] = train(changed, folder / name), logger.read_metrics(folder / name / logger.METRICS_FILE)
    return ended


@pytest.mark.long
def test_both_learn_alike(runs):
    losses = {name: np.array([line["train/loss"] for line in lines]) for name, (_, lines) in runs.items()}
    assert losses["float32"][-1] < 0.9 * losses["float32"][0]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)
    assert np.abs(losses["bfloat16"] - losses["float32"]).max() > 0  # they are two runs


@pytest.mark.long
def test_state_and_metrics_are_in_float32(runs):
    state = runs["bfloat16"][0]
    floats = [x for x in jax.tree.leaves(state) if eqx.is_inexact_array(x)]
    assert {x.dtype.name for x in floats} == {"float32"}


def weight(encoder):
    return np.asarray(encoder.stack.blocks.mlp.fc1.weight, np.float64)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_in_bfloat16_stalls_and_ours_does_not(precision):
    """At the published momentum, 0.996, and a rate of the schedule's end: how far the teacher moves, over how far it
    should. The steps compute in bfloat16 either way; the setting says how the teacher is kept."""
    config = shrunk("ijepa_fashion_mnist")
    momentum = replace(config.method.ema, start=0.996, end=0.996, dtype=precision)
    rate = dict.fromkeys(("start_lr", "peak_lr", "final_lr"), 1e-4)
    config = replace(config, method=replace(config.method, ema=momentum), optim=replace(config.optim, **rate))
    setup = make_setup(config)
    setup = replace(setup, plan=sharding.ShardingPlan(sharding.make_mesh(1)))
    state, context = setup.init_state(), TrainContext(setup.optimizer, jnp.bfloat16, plan=setup.plan)
    start, exact = weight(state.method.encoder), weight(state.method.encoder)
    rounded = weight(state.method.target_encoder.average)
    for images in setup.batches(steps=20):
        state, _ = run_train_step(state, sharding.shard_batch(images, setup.plan.mesh), jr.key(1), context)
        exact = 0.996 * exact + 0.004 * weight(state.method.encoder)
    moved = np.linalg.norm(weight(state.method.target_encoder.average) - rounded)
    share = moved / np.linalg.norm(exact - start)
    assert 0.99 < share < 1.01 if precision == "float32" else share < 0.5
