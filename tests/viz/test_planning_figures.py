"""Figures of planning show the episodes and distances that were measured."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from jepax.data.simulate import render
from jepax.envs import TwoRoom
from jepax.evals.agents import ActionScale, ModelCost, PlannerAgent
from jepax.evals.planning import Outcome, Task, run_agent
from jepax.evals.world_model import embed_frames
from jepax.methods.lewm import LeWMConfig
from jepax.nn import CausalPredictorConfig, ViTConfig
from jepax.planners import CEM
from jepax.training.planning import Played
from jepax.viz import planning
from jepax.viz.episodes import GIF_GAP, animate, choose_episodes, plot_episodes, to_rgb
from jepax.viz.planning import draw_planning, imagine, plot_distances, plot_imagined

ENV = TwoRoom(image_size=32)
SCALE = ActionScale((0.1, -0.1), (0.8, 0.9), 5)
START = np.array([[40, 40], [40, 150], [160, 60], [180, 180]], np.float32)
GOAL = np.array([[45, 40], [60, 150], [60, 50], [150, 60]], np.float32)


@pytest.fixture(scope="module")
def played() -> Played:
    """Two plans of two blocks; the second one is cut by the budget."""
    vit = ViTConfig(patch_size=16, width=8, depth=1, num_heads=1, class_token=True, learned_grid=(2, 2))
    predictor = CausalPredictorConfig(width=8, depth=1, num_heads=1, head_width=8, mlp_width=8)
    config = LeWMConfig(encoder=vit, predictor=predictor, embed_dim=8, head_dim=8)
    model = eqx.filter_jit(config.build)(total_steps=1, key=jr.key(0))
    planner = CEM(horizon=2, num_samples=4, num_iterations=1, num_elites=2)
    agent = PlannerAgent(planner, SCALE, ModelCost(ENV, model))
    task = Task(START, GOAL, 15)
    outcome = run_agent(ENV, agent, task, jr.key(1))
    states = np.random.default_rng(0).uniform(25, 195, (60, 2)).astype(np.float32)
    return Played(agent, {"same_region": task}, {"same_region": outcome}, render(ENV, states), states)


def with_reached(played: Played, reached) -> Played:
    old = played.outcomes["same_region"]
    outcome = Outcome(old.states, jnp.asarray(reached, bool), old.actions)
    return played._replace(outcomes={"same_region": outcome})


def test_the_run_gets_its_figures(played, tmp_path):
    paths = draw_planning(played, tmp_path)
    names = ["distance.png", "episode.gif", "episode.png", "imagined.png"]
    assert sorted(path.name for path in paths) == names
    assert sorted((tmp_path / "figures").iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == path.suffix[1:].upper() and min(image.size) >= 224
    with Image.open(tmp_path / "figures/episode.gif") as gif:
        assert gif.n_frames > 1 and gif.size == (2 * 224 + GIF_GAP, 224)


def test_the_first_success_and_the_first_failure_outside_the_goal_are_shown(played):
    """Episode 0 starts inside the goal."""
    reached = np.zeros((4, 15))
    reached[0], reached[2, 6:8] = 1, 1
    won, lost = choose_episodes(with_reached(played, reached))
    np.testing.assert_array_equal([won.goal, lost.goal], GOAL[[2, 1]])
    assert won.result == "reached at step 7" and lost.result == "never reached"
    (only,) = choose_episodes(with_reached(played, np.ones((4, 15))))
    np.testing.assert_array_equal(only.goal, GOAL[1])


def test_a_row_shows_the_start_what_each_plan_led_to_and_the_goal(played):
    shown = choose_episodes(with_reached(played, np.zeros((4, 15))))
    cells = plot_episodes(played, shown).axes
    names = ["same region: start", "plan 1: step 10", "plan 2: step 15", "goal: never reached"]
    assert [cell.get_title() for cell in cells] == names
    expected = render(ENV, np.stack([*shown[0].states[[0, 10, 15]], GOAL[1]]))
    for cell, image in zip(cells, expected, strict=True):
        np.testing.assert_allclose(cell.images[0].get_array(), image / 255)


def test_the_animation_has_every_state_with_the_goal_on_the_right(played):
    (shown,) = choose_episodes(with_reached(played, np.zeros((4, 15))))
    images = [np.asarray(image)[::7, ::7] for image in animate(played, shown)]
    expected = render(ENV, np.stack([*shown.states, shown.goal]))
    assert len(images) == 16
    for image, state in zip(images, expected, strict=False):
        np.testing.assert_array_equal(image[:, :32], state)
    np.testing.assert_array_equal(np.asarray(animate(played, shown)[3])[::7, 224 + GIF_GAP :: 7], expected[-1])


def test_imagined_embeddings_are_those_that_the_plan_was_chosen_by(played):
    outcome = played.outcomes["same_region"]
    found = np.asarray(imagine(played, START[1], np.asarray(outcome.actions[1, :10])))
    blocks = jnp.asarray((outcome.actions[1, :10] - jnp.array(SCALE.mean)) / jnp.array(SCALE.std)).reshape(1, 2, 10)
    make_cost = played.agent.cost
    cost = eqx.filter_jit(lambda start, goal: make_cost(start, goal)(blocks))(
        jnp.asarray(START[1]), jnp.asarray(GOAL[1])
    )
    z_goal = embed_frames(make_cost.model, render(ENV, GOAL[1:2]))[0]
    assert found.shape == (3, 8)
    np.testing.assert_allclose(np.square(found[-1] - z_goal).sum(), cost[0], rtol=1e-4)


def test_distances_to_the_goal_are_least_at_the_goal_and_those_of_the_world_below(played):
    """With positions as embeddings both rows are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "embed_frames", lambda model, frames: GOAL[:3])
        figure = plot_distances(played, played.states)
    axes = figure.axes[:6]
    assert [cell.get_title() for cell in axes] == ["rank correlation 1.00 in the goal's region"] * 3 + [""] * 3
    for ours, true, goal in zip(axes[:3], axes[3:], GOAL, strict=False):
        a, b = (cell.collections[0] for cell in (ours, true))
        np.testing.assert_allclose(a.get_array(), b.get_array(), rtol=1e-4)
        nearest = a.get_offsets()[np.argmin(a.get_array())]
        assert np.linalg.norm(nearest - goal) < 2 * np.linalg.norm(a.get_offsets() - goal, axis=1).min() + 10


def test_a_model_that_imagines_what_happens_is_no_distance_apart(played):
    (shown,) = choose_episodes(with_reached(played, np.zeros((4, 15))))
    real = shown.states[:11:5]
    seen = played._replace(states=np.concatenate([played.states, real]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "imagine", lambda played, start, actions: real)
        cell = plot_imagined(seen, [shown], seen.states).axes[0]
    assert cell.get_title() == "same region: never reached; error 0.0"
    imagined = next(line for line in cell.lines if line.get_label() == "imagined")
    np.testing.assert_allclose(np.stack(imagined.get_data(), axis=1), real)


@pytest.mark.parametrize(("channels", "expected"), [(1, [9, 9, 9]), (2, [9, 8, 0]), (3, [9, 8, 7]), (4, [9, 8, 7])])
def test_images_of_any_channels_have_colors(channels, expected):
    image = np.array([9, 8, 7, 6], np.uint8)[:channels].reshape(1, 1, 1, -1)
    assert to_rgb(image)[0, 0, 0].tolist() == expected


def test_actions_are_those_that_moved_the_agent(played):
    outcome = jax.tree.map(np.asarray, played.outcomes["same_region"])
    state = outcome.states[0, 0]
    for action, after in zip(outcome.actions[0], outcome.states[0, 1:], strict=True):
        state = np.asarray(ENV.step(jnp.asarray(state), jnp.asarray(action), jr.key(0)))
        np.testing.assert_allclose(state, after, atol=1e-3)
