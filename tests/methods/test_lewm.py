"""LeWorldModel: what its loss reads, its running statistics, and rollouts."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.data import ClipSource, DataConfig, open_source
from jepax.data.episodes import Episodes
from jepax.evals.agents import goal_cost
from jepax.methods import MethodConfig
from jepax.methods.lewm import LeWM, LeWMConfig
from jepax.optim import OptimConfig, Optimizer
from jepax.training.monitor import log_values
from jepax.training.step import TrainContext, init_train_state, run_train_step
from jepax.trees import count_parameters, trainable
from jepax.types import ClipBatch, UserError

CONFIG = LeWMConfig().tiny()
BATCH, CLIP, ACTION = 16, 4, 10


def clip_batch():
    """Noise, and actions between its frames."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (BATCH, CLIP, 32, 32, 3), np.uint8)
    actions = rng.normal(size=(BATCH, CLIP, ACTION)).astype(np.float32)
    return ClipBatch(jnp.asarray(frames), jnp.asarray(actions), jnp.arange(BATCH, dtype=jnp.int32))


@eqx.filter_jit
def build(config):
    return config.build(total_steps=30, key=jr.key(0))


@eqx.filter_jit
def shift(method: LeWM) -> LeWM:
    """The method with modulations that are not zero: before the first update, no action changes a prediction."""

    def where(m):
        return [block.modulation for block in m.predictor.blocks]

    return eqx.tree_at(where, method, jax.tree.map(lambda x: x + 0.3 * jr.normal(jr.key(1), x.shape), where(method)))


@pytest.fixture(scope="module")
def method():
    return shift(build(CONFIG))


@pytest.fixture(scope="module")
def batch():
    return clip_batch()


@eqx.filter_jit
def loss_and_gradients(method, batch):
    params, frozen = eqx.partition(method, trainable(method))
    return jax.value_and_grad(lambda p: eqx.combine(p, frozen).loss(batch, key=jr.key(1)), has_aux=True)(params)


def test_it_is_registered_at_its_published_size():
    assert MethodConfig.registry["lewm"] is LeWMConfig
    method = eqx.filter_eval_shape(lambda: LeWMConfig().build(total_steps=10, key=jr.key(0)))
    assert count_parameters(method) - count_parameters(method.statistics) == 18_034_478


def test_every_parameter_but_the_statistics_has_a_gradient(method, batch):
    (loss, metrics), grads = loss_and_gradients(method, batch)
    expected = metrics["train/prediction_loss"] + CONFIG.sigreg_weight * metrics["train/sigreg_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert jax.tree.leaves(grads.statistics) == []
    values = log_values(metrics)
    assert "health/embedding/rankme" in values and "health/projection/rankme" not in values
    assert not [name for name in values if name.startswith("state/")]


@pytest.mark.parametrize(("frame", "matters"), [(0, True), (2, True), (3, False)])
def test_the_loss_reads_the_actions_between_frames(method, batch, frame, matters):
    changed = replace(batch, actions=batch.actions.at[:, frame].add(1.0))
    before, after = (float(loss_and_gradients(method, each)[0][0]) for each in (batch, changed))
    assert (abs(before - after) > 1e-4) is matters


def test_a_detached_target_changes_the_gradient_and_not_the_loss(method, batch):
    detached = shift(build(replace(CONFIG, detach_target=True)))
    (loss, _), grads = loss_and_gradients(method, batch)
    (other, _), others = loss_and_gradients(detached, batch)
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    error = np.linalg.norm(grads.projector.fc2.weight - others.projector.fc2.weight)
    assert error > 0.1 * np.linalg.norm(grads.projector.fc2.weight)
    np.testing.assert_allclose(grads.head.fc2.weight, others.head.fc2.weight, rtol=1e-4, atol=1e-6)


def test_training_moves_the_running_statistics_and_lowers_the_loss(batch):
    optimizer = Optimizer(OptimConfig(peak_lr=3e-3, start_lr=3e-3), 30, 0)
    method = build(CONFIG)
    first = jax.tree.map(np.array, method.statistics.average)  # a copy: the step writes over its state
    state, losses = init_train_state(method, optimizer), []
    np.testing.assert_array_equal(first.head, [np.zeros(CONFIG.head_dim), np.ones(CONFIG.head_dim)])
    for _ in range(30):
        state, metrics = run_train_step(state, batch, jr.key(1), TrainContext(optimizer))
        losses.append(float(metrics["train/loss"]))
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    for name in ("projector", "head"):
        running, last = getattr(state.method.statistics.average, name), metrics[f"state/{name}"]
        assert np.linalg.norm(running - last) < 0.5 * np.linalg.norm(getattr(first, name) - last)


def test_a_prediction_is_the_same_in_every_window_that_holds_what_it_sees(method):
    """Without dropout, by the running statistics; an action changes what comes after it, and nothing before."""
    z = eqx.filter_jit(method.embed)(clip_batch().frames[0])  # (4, D)
    rollout = eqx.filter_jit(method.rollout)
    candidates = jr.normal(jr.key(2), (3, 5, ACTION))
    none = jnp.zeros((0, ACTION))
    embeddings = rollout(z[:1], none, candidates)
    assert embeddings.shape == (3, 6, CONFIG.embed_dim)
    np.testing.assert_array_equal(embeddings[:, 0], jnp.broadcast_to(z[0], (3, CONFIG.embed_dim)))

    # A later action changes no earlier embedding.
    changed = rollout(z[:1], none, candidates.at[:, 3].add(1.0))
    np.testing.assert_array_equal(changed[:, :4], embeddings[:, :4])
    assert np.abs(changed[:, 4:] - embeddings[:, 4:]).min(axis=(0, 2)).max() > 0

    # By hand: the window's frames and blocks, with positions from 0.
    @eqx.filter_jit
    def predict(method, recent, blocks):
        rows = method.predictor(recent, method.action_encoder(blocks))[:, -1]
        return method.head(rows, method.statistics.average.head)[0]

    for last in (1, 2, 4):
        recent = slice(max(last - 2, 0), last + 1)
        expected = predict(method, embeddings[:, recent], candidates[:, recent])
        np.testing.assert_allclose(embeddings[:, last + 1], expected, atol=1e-4)

    # A window of one frame, whatever was seen before.
    one = rollout(z[:3], jr.normal(jr.key(3), (2, ACTION)), candidates, window=1)
    np.testing.assert_allclose(one[:, 3:], rollout(z[2:3], none, candidates, window=1)[:, 1:], atol=1e-5)
    goal = embeddings[1, -1]
    assert int(jnp.argmin(goal_cost(embeddings, goal))) == 1 and goal_cost(embeddings, goal).shape == (3,)


def clip_source(steps=30, size=32, channels=3):
    """One episode of zeros."""
    actions, frames = np.zeros((steps, 2), np.float32), np.zeros((steps, size, size, channels), np.uint8)
    one = Episodes(actions, actions, np.array([steps]), frames)
    return ClipSource(one, np.array([0]), CLIP, ACTION // 2, np.zeros(2, np.float32), np.ones(2, np.float32), {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"predictor": replace(CONFIG.predictor, history=2)},
            r"^method\.predictor\.history=2, but the clips need 3, data\.clip_frames - 1; set one as the other",
        ),
        ({"action_dim": 4}, r"^method\.action_dim=4, but the clips need 10, data\.frame_skip times"),
        (
            {"encoder": replace(CONFIG.encoder, in_channels=1), "pixel_mean": (0.5,), "pixel_std": (0.5,)},
            r"^method\.encoder\.in_channels=1, but the clips need 3",
        ),
        ({"encoder": replace(CONFIG.encoder, patch_size=5)}, r"^method\.encoder: .* not a multiple of patch_size=5"),
        ({"encoder": replace(CONFIG.encoder, learned_grid=(2, 2))}, r"^method\.encoder: learned_grid=\(2, 2\), but"),
    ],
)
def test_clips_that_do_not_fit_are_refused(batch, changes, words):
    """By the check of a run before it begins, and by the method itself."""
    config = replace(CONFIG, **changes)
    with pytest.raises(UserError, match=words):
        config.check_data(clip_source())
    method = eqx.filter_eval_shape(lambda: config.build(total_steps=1, key=jr.key(0)))
    with pytest.raises(UserError, match=words):
        eqx.filter_eval_shape(lambda m: m.loss(batch, key=jr.key(0)), method)


def test_data_that_fits_is_accepted_and_images_are_refused():
    CONFIG.check_data(clip_source())
    images = open_source(DataConfig(dataset="synthetic", canvas_size=32, synthetic_size=40), "train")
    with pytest.raises(UserError, match=r"^method lewm reads clips with actions, but the data has 40 images of"):
        CONFIG.check_data(images)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"class_token=False"):
        replace(CONFIG, encoder=replace(CONFIG.encoder, class_token=False))
    with pytest.raises(UserError, match=r"pixel_mean=\(0\.5,\)"):
        replace(CONFIG, pixel_mean=(0.5,), pixel_std=(0.5,))
