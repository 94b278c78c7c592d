"""The guard's actions, and what a step that it does not apply leaves as it was."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.training import grad_guard
from jepax.training.grad_guard import MEDIAN_WINDOW, MIN_KNOWN_NORMS, Action, GradGuardConfig, GradGuardState
from jepax.training.monitor import track_update_norms
from jepax.training.setup import make_setup
from jepax.training.step import TrainContext, init_train_state, train_step
from jepax.types import UserError
from tests.contracts.shrink import shrunk

CONFIG = GradGuardConfig(max_consecutive_nonfinite=3)
NAN, INF = jnp.float32(np.nan), jnp.float32(np.inf)


def fed(norms, config=CONFIG):
    """The guard after steps of these gradient norms, and its actions."""
    state, actions = GradGuardState.new(), []
    for step, norm in enumerate(norms):
        action = state.classify(config, jnp.float32(0), jnp.float32(norm))
        actions.append(int(action))
        state = state.update(action, jnp.float32(norm), jnp.int32(step))
    return state, actions


@pytest.mark.parametrize("loss", [NAN, INF, -INF, jnp.float32(1)])
@pytest.mark.parametrize("norm", [NAN, INF, jnp.float32(1)])
def test_what_is_not_finite_is_refused(loss, norm):
    fine = bool(jnp.isfinite(loss) & jnp.isfinite(norm))
    assert int(GradGuardState.new().classify(CONFIG, loss, norm)) == (Action.APPLIED if fine else Action.NONFINITE)


def test_a_spike_is_above_the_factor_times_the_median_of_the_known():
    norms = np.random.default_rng(0).uniform(0.5, 2.0, 40)
    state, actions = fed(norms)
    assert set(actions) == {Action.APPLIED}
    np.testing.assert_allclose(state.limit(CONFIG), 10 * np.median(norms), rtol=1e-6)
    limit = state.limit(CONFIG)
    assert int(state.classify(CONFIG, limit, limit)) == Action.APPLIED
    assert int(state.classify(CONFIG, limit, limit * 1.001)) == Action.CLIPPED


def test_the_window_forgets():
    norms = np.concatenate([np.full(50, 100.0), np.linspace(1, 2, MEDIAN_WINDOW)])
    np.testing.assert_allclose(fed(norms)[0].limit(CONFIG), 10 * np.median(norms[-MEDIAN_WINDOW:]), rtol=1e-6)


def test_nothing_is_a_spike_while_few_norms_are_known():
    assert fed([1.0] * (MIN_KNOWN_NORMS - 1) + [1e6])[1][-1] == Action.APPLIED
    assert fed([1.0] * MIN_KNOWN_NORMS + [1e6])[1][-1] == Action.CLIPPED


@pytest.mark.parametrize(("setting", "action"), grad_guard.SPIKE_ACTIONS.items())
def test_what_is_done_about_a_spike_is_a_setting(setting, action):
    config = replace(CONFIG, on_spike=setting)
    state, actions = fed([1.0] * MIN_KNOWN_NORMS + [1000.0], config)
    assert actions[-1] == action
    expected = 0.01 if setting == "clip" else 1.0
    np.testing.assert_allclose(
        fed([1.0] * MIN_KNOWN_NORMS, config)[0].scale(config, jnp.int32(action), jnp.float32(1000)), expected
    )
    assert int(state.num_skipped) == (action == Action.SKIPPED)


def test_a_gradient_that_stays_large_soon_counts_as_usual():
    actions = fed([1.0] * MIN_KNOWN_NORMS + [100.0] * 2 * MEDIAN_WINDOW, replace(CONFIG, on_spike="skip"))[1]
    assert actions.index(Action.APPLIED, MIN_KNOWN_NORMS) <= 2 * MIN_KNOWN_NORMS + 1


def test_after_its_patience_nothing_is_taken_any_more():
    state, actions = fed([np.nan] * 3 + [1.0] * 3)
    assert actions == [Action.NONFINITE] * 3 + [Action.OFF] * 3
    assert int(state.consecutive_nonfinite) == 3 and int(state.num_skipped) == 3 and not jnp.isfinite(state.norms).any()


def test_only_steps_in_a_row_count():
    state, actions = fed([np.nan, np.nan, 1.0] * 4)
    assert Action.OFF not in actions and int(state.consecutive_nonfinite) == 0 and int(state.num_skipped) == 8


@pytest.mark.parametrize(("patience", "factor"), [(0, 10.0), (3, 1.0)])
def test_senseless_settings_are_refused(patience, factor):
    with pytest.raises(
        UserError, match=r"train\.grad_guard\.(max_consecutive_nonfinite=0|spike_threshold=1\.0) must be"
    ):
        GradGuardConfig(max_consecutive_nonfinite=patience, spike_threshold=factor)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def taken(request):
    """One step of a network with a teacher, as a function of the guard's action: the state before, and a step.

    In the form that the update has on a CPU, and in that which it has elsewhere.
    """
    setup = make_setup(shrunk("byol_fashion_mnist"))
    method = setup.config.method.build(total_steps=6, key=jr.key(0))
    state = init_train_state(method, setup.optimizer)
    batch = jax.tree.map(jnp.asarray, next(setup.batches(steps=1)))

    @eqx.filter_jit
    def step(action):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GradGuardState, "classify", lambda *_: action)
            patch.setattr(grad_guard.jax, "default_backend", lambda: request.param)
            return train_step(state, batch, jr.key(1), TrainContext(setup.optimizer))

    return state, lambda action: step(jnp.int32(action))


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


@pytest.mark.parametrize("action", [Action.NONFINITE, Action.SKIPPED, Action.OFF, Action.APPLIED])
def test_a_skipped_step_leaves_parameters_teacher_and_optimizer_as_they_were(taken, action):
    before, step = taken
    measure = track_update_norms(before.method, 0)
    after, metrics = step(action)
    assert int(after.step) == int(before.step) + 1
    moved = measure(after.method, metrics)
    assert {"optim/update_norm", "ema/momentum", "ema/update_norm"} <= set(moved)
    assert all(np.isfinite(value) == (action == Action.APPLIED) for value in moved.values())
    for name in ("method", "opt_state"):
        pairs = zip(arrays(getattr(before, name)), arrays(getattr(after, name)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == (action != Action.APPLIED)
