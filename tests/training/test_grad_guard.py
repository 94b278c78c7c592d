"""The guard's verdicts, and what a step that it refuses leaves as it was."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.data import open_source
from jepax.training import grad_guard, movement
from jepax.training.config import setup_data_and_optimizer
from jepax.training.grad_guard import MEDIAN_WINDOW, MIN_KNOWN_NORMS, GradGuardConfig, GradGuardState
from jepax.training.loop import train_batches
from jepax.training.step import init_state, train_step
from jepax.types import UserError
from tests.contracts.shrink import shrunk

CONFIG = GradGuardConfig(patience=3)
NAN, INF = jnp.float32(np.nan), jnp.float32(np.inf)


def fed(norms, config=CONFIG):
    """The guard after steps of these gradient norms, and its verdicts."""
    state, verdicts = GradGuardState.new(), []
    for step, norm in enumerate(norms):
        verdict = state.judge(config, jnp.float32(0), jnp.float32(norm))
        verdicts.append(int(verdict))
        state = state.after(verdict, jnp.float32(norm), jnp.int32(step))
    return state, verdicts


@pytest.mark.parametrize("loss", [NAN, INF, -INF, jnp.float32(1)])
@pytest.mark.parametrize("norm", [NAN, INF, jnp.float32(1)])
def test_what_is_not_finite_is_refused(loss, norm):
    fine = bool(jnp.isfinite(loss) & jnp.isfinite(norm))
    assert int(GradGuardState.new().judge(CONFIG, loss, norm)) == (grad_guard.FINE if fine else grad_guard.NOT_FINITE)


def test_a_spike_is_above_the_factor_times_the_median_of_the_known():
    norms = np.random.default_rng(0).uniform(0.5, 2.0, 40)
    state, verdicts = fed(norms)
    assert set(verdicts) == {grad_guard.FINE}
    np.testing.assert_allclose(state.limit(CONFIG), 10 * np.median(norms), rtol=1e-6)
    limit = state.limit(CONFIG)
    assert int(state.judge(CONFIG, limit, limit)) == grad_guard.FINE
    assert int(state.judge(CONFIG, limit, limit * 1.001)) == grad_guard.CLIPPED


def test_the_window_forgets():
    norms = np.concatenate([np.full(50, 100.0), np.linspace(1, 2, MEDIAN_WINDOW)])
    np.testing.assert_allclose(fed(norms)[0].limit(CONFIG), 10 * np.median(norms[-MEDIAN_WINDOW:]), rtol=1e-6)


def test_nothing_is_a_spike_while_few_norms_are_known():
    assert fed([1.0] * (MIN_KNOWN_NORMS - 1) + [1e6])[1][-1] == grad_guard.FINE
    assert fed([1.0] * MIN_KNOWN_NORMS + [1e6])[1][-1] == grad_guard.CLIPPED


@pytest.mark.parametrize(("action", "verdict"), grad_guard.SPIKE_ACTIONS.items())
def test_what_is_done_about_a_spike_is_a_setting(action, verdict):
    config = replace(CONFIG, spike=action)
    state, verdicts = fed([1.0] * MIN_KNOWN_NORMS + [1000.0], config)
    assert verdicts[-1] == verdict
    expected = 0.01 if action == "clip" else 1.0
    np.testing.assert_allclose(
        fed([1.0] * MIN_KNOWN_NORMS, config)[0].scale(config, jnp.int32(verdict), jnp.float32(1000)), expected
    )
    assert int(state.unused) == (verdict in (grad_guard.SKIPPED, grad_guard.ROLL_BACK))


def test_a_gradient_that_stays_large_soon_counts_as_usual():
    verdicts = fed([1.0] * MIN_KNOWN_NORMS + [100.0] * 2 * MEDIAN_WINDOW, replace(CONFIG, spike="skip"))[1]
    assert verdicts.index(grad_guard.FINE, MIN_KNOWN_NORMS) <= 2 * MIN_KNOWN_NORMS + 1


def test_after_its_patience_nothing_is_taken_any_more():
    state, verdicts = fed([np.nan] * 3 + [1.0] * 3)
    assert verdicts == [grad_guard.NOT_FINITE] * 3 + [grad_guard.OFF] * 3
    assert int(state.in_a_row) == 3 and int(state.unused) == 3 and not jnp.isfinite(state.norms).any()


def test_only_steps_in_a_row_count():
    state, verdicts = fed([np.nan, np.nan, 1.0] * 4)
    assert grad_guard.OFF not in verdicts and int(state.in_a_row) == 0 and int(state.unused) == 8


@pytest.mark.parametrize(("patience", "factor"), [(0, 10.0), (3, 1.0)])
def test_senseless_settings_are_refused(patience, factor):
    with pytest.raises(UserError, match=r"train\.guard\.(patience=0|factor=1\.0) must be"):
        GradGuardConfig(patience=patience, factor=factor)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def taken(request):
    """One step of a network with a teacher, as a function of the verdict: the states before it and after it.

    In the form that the update has on a CPU, and in that which it has elsewhere.
    """
    config = shrunk("byol_fashion_mnist")
    _, optimizer = setup_data_and_optimizer(config)
    state = init_state(config.method.build(total_steps=6, key=jr.key(0)), optimizer)
    (images,) = train_batches(config, open_source(config.data, "train"), 1, 0)

    @eqx.filter_jit
    def step(verdict):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GradGuardState, "judge", lambda *_: verdict)
            patch.setattr(grad_guard.jax, "default_backend", lambda: request.param)
            return train_step(optimizer, state, images, jr.key(1))

    return state, lambda verdict: step(jnp.int32(verdict))


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


@pytest.mark.parametrize(
    "verdict", [grad_guard.NOT_FINITE, grad_guard.SKIPPED, grad_guard.ROLL_BACK, grad_guard.OFF, grad_guard.FINE]
)
def test_a_refused_step_leaves_parameters_teacher_and_optimiser_as_they_were(taken, verdict):
    before, step = taken
    measure = movement.track_update_norms(before.method, 0)
    after, _ = step(verdict)
    assert int(after.step) == int(before.step) + 1
    moved = measure(after.method, jnp.int32(verdict))
    assert {"update_norm", "momentum", "ema_step_norm"} <= set(moved)
    assert all(np.isfinite(value) == (verdict == grad_guard.FINE) for value in moved.values())
    for name in ("method", "opt_state"):
        pairs = zip(arrays(getattr(before, name)), arrays(getattr(after, name)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == (verdict != grad_guard.FINE)
