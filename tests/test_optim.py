"""The optimizer: schedules, what is decayed, clipping."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from jepax import schedules
from jepax.optim import MUON_UPDATE_RMS, OptimConfig, Optimizer, matrix_mask, weight_decay_mask
from jepax.trees import global_norm, trainable
from jepax.types import UserError
from tests.contracts.shrink import shrunk


@pytest.fixture(scope="module")
def params():
    config = shrunk("ijepa_vitb16_in1k", prediction_norm="affine")
    method = config.method.build(total_steps=10, key=jr.key(0))
    return eqx.filter(method, trainable(method))


def test_decay_is_for_matrices_and_the_mask_token_alone(params):
    marks = jax.tree_util.tree_leaves_with_path(weight_decay_mask(params))
    names = {jax.tree_util.keystr(path): mark for path, mark in marks}
    assert {name for name, mark in names.items() if mark} == {
        name for name in names if name.endswith(".weight") and "norm" not in name
    } | {".predictor.mask_token"}
    assert not any(mark for name, mark in names.items() if name.endswith("bias") or "norm" in name)


def test_an_update_is_optax_adamw(params):
    """At constant rates, over three steps, on parameters that are all decayed."""
    config = OptimConfig(peak_lr=1e-2, start_lr=1e-2, final_lr=1e-2, weight_decay=0.3, weight_decay_schedule="constant")
    ours, theirs = Optimizer(config, 10, 0), optax.adamw(1e-2, weight_decay=0.3, mask=weight_decay_mask(params))
    state_ours, state_theirs, a, b = ours.init(params), theirs.init(params), params, params
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.sin(x + step), params)
        update, state_ours = ours.update(grads, state_ours, a, jnp.int32(step))
        a = eqx.apply_updates(a, update)
        update, state_theirs = theirs.update(grads, state_theirs, b)
        b = eqx.apply_updates(b, update)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_muon_takes_the_matrices_of_the_blocks_alone(params):
    marks = {
        jax.tree_util.keystr(path): mark for path, mark in jax.tree_util.tree_leaves_with_path(matrix_mask(params))
    }
    layers = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    expected = {f".{of}.stack.blocks.{layer}.weight" for of in ("encoder", "predictor") for layer in layers}
    assert {name for name, mark in marks.items() if mark} == expected


def test_muon_moves_every_singular_direction_alike_and_the_rest_as_adamw(params):
    """Each layer's matrix keeps the gradient's directions, and all but its nearly empty ones get the same length."""
    rates = {"peak_lr": 1e-2, "start_lr": 1e-2, "final_lr": 1e-2, "weight_decay": 0.0, "final_weight_decay": 0.0}
    grads = jax.tree.map(lambda x: jr.normal(jr.key(x.size), x.shape), params)
    muon, adamw = (Optimizer(OptimConfig(name=rule, **rates), 10, 0) for rule in ("muon", "adamw"))
    (moved, _), (adam, _) = (o.update(grads, o.init(params), params, jnp.int32(0)) for o in (muon, adamw))
    flat = zip(*(jax.tree.leaves(tree) for tree in (matrix_mask(params), moved, adam, grads)), strict=True)
    for is_matrix, update, reference, grad in flat:
        if not is_matrix:
            np.testing.assert_array_equal(update, reference)
            continue
        for layer, slope in zip(np.asarray(update, np.float64), np.asarray(grad, np.float64), strict=True):
            values = np.linalg.svd(layer, compute_uv=False) / (1e-2 * MUON_UPDATE_RMS * np.sqrt(max(layer.shape)))
            left, strength, right = np.linalg.svd(slope, full_matrices=False)
            moved_far = strength > 0.1 * strength[0]
            assert 0.6 < values[: moved_far.sum()].min() and values.max() < 1.3
            np.testing.assert_allclose(np.diagonal(left.T @ layer @ right.T) < 0, True)


def test_clipping_bounds_the_global_norm(params):
    grads = jax.tree.map(lambda x: 100.0 * jnp.ones_like(x), params)
    clipped, plain = (Optimizer(OptimConfig(grad_clip_norm=clip), 10, 0) for clip in (1.0, None))
    moments = [o.update(grads, o.init(params), params, jnp.int32(0))[1][1].mu for o in (clipped, plain)]
    norms = [float(global_norm(m)) / 0.1 for m in moments]  # the first mean is (1 - beta1) of the gradient
    assert norms[0] == pytest.approx(1.0, rel=1e-3) and norms[1] > 1000


def test_warmup_then_cosine():
    rates = [float(schedules.warmup_cosine(s, start=0.2, peak=1.0, final=0.1, warmup=5, total=20)) for s in range(25)]
    assert rates[0] == pytest.approx(0.2) and rates[5] == pytest.approx(1.0)
    assert (np.diff(rates[:6]) > 0).all() and (np.diff(rates[5:]) <= 0).all()
    np.testing.assert_allclose(rates[20:], 0.1, rtol=1e-6)
    half = 5 + 7.5
    middle = float(schedules.warmup_cosine(half, start=0.2, peak=1.0, final=0.1, warmup=5, total=20))
    assert middle == pytest.approx(0.55, rel=1e-5)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.75), ("cosine", 0.75), ("constant", 0.5)])
def test_ramps(shape, middle):
    values = [float(schedules.ramp(shape, s, start=0.5, final=1.0, total=10)) for s in (0, 5, 10, 15)]
    end = 0.5 if shape == "constant" else 1.0
    np.testing.assert_allclose(values, [0.5, middle, end, end], rtol=1e-6)


def test_muon_decays_and_schedules_as_adamw(params):
    """A zero gradient leaves the decay alone: both rules make the same change."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizers = [Optimizer(OptimConfig(name=rule, weight_decay=0.3), 10, 2) for rule in ("muon", "adamw")]
    first, second = (o.update(zeros, o.init(params), params, jnp.int32(4))[0] for o in optimizers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), first, second)


@pytest.mark.parametrize(
    "settings", [{"peak_lr": 0.0}, {"beta2": 1.0}, {"grad_clip_norm": -1.0}, {"weight_decay": -0.1}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=f"optim.{next(iter(settings))}="):
        OptimConfig(**settings)
