"""PLDM's Two-Room: its walls, its collisions, its images, and an expert that reaches every goal."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.envs import Expert, NoisyExpert, TwoRoomPLDM, collect
from jepax.envs.two_room_pldm import MAX_STEP

FIXED, RANDOM = TwoRoomPLDM(), TwoRoomPLDM(random_walls=True)
step = jax.jit(jax.vmap(FIXED.step, (None, None, 0)))


def state(x, y):
    return jnp.array([x, y, 32.0, 18.0])


@pytest.mark.parametrize("env", [FIXED, RANDOM], ids=["fixed", "random"])
def test_starts_and_goals_are_in_different_rooms(env):
    start, goal = map(np.asarray, jax.jit(jax.vmap(env.reset))(jr.split(jr.key(0), 2000)))
    np.testing.assert_array_equal(start[:, 2:], goal[:, 2:])
    columns, rows = start[:, 2], start[:, 3]
    if env is RANDOM:
        assert set(columns) == set(range(20, 45)) and set(rows) == set(range(10, 55))
    else:
        assert set(columns) == {32} and set(rows) == {18}
    left = start[:, 0] < columns
    assert ((goal[:, 0] < columns) != left).all() and 0.45 < left.mean() < 0.55
    for states in (start, goal):
        assert (np.abs(states[:, 0] - columns) >= 2.5).all()
        assert states[:, :2].min() >= 5 and states[:, :2].max() <= 59
        np.testing.assert_allclose([states[:, 1].min(), states[:, 1].max()], [5, 59], atol=0.5)


def test_the_agent_stays_inside_and_crosses_only_at_the_door():
    states = np.asarray(collect(RANDOM, NoisyExpert(), 200, jr.key(1), 60).states)
    x, y, wall_x, door_y = np.moveaxis(states, -1, 0)
    assert 4 < min(x.min(), y.min()) and max(x.max(), y.max()) < 60
    in_door = np.abs(y - door_y) < 4
    assert in_door[np.abs(x - wall_x) < 1.5].all()
    changed = np.sign(x - wall_x)[:, 1:] != np.sign(x - wall_x)[:, :-1]
    assert (in_door[:, 1:] | in_door[:, :-1])[changed].all() and changed.sum() > 20
    assert (states[:, :, 2:] == states[:, :1, 2:]).all()


@pytest.mark.parametrize(
    ("start", "action", "line"),
    [
        ((30.0, 40.0), (1, 0.2), "left face"),
        ((34.0, 40.0), (-1, 0.2), "right face"),
        ((32.0, 20.5), (0.2, 1), "lower side"),
        ((32.0, 15.5), (-0.2, -1), "upper side"),
        ((5.0, 50.0), (-1, 0), "left border"),
        ((50.0, 59.0), (0.3, 1), "lower border"),
    ],
)
def test_a_collision_goes_back_by_the_size_of_a_normal(start, action, line):
    axis, place, near = {
        "left face": (0, 30.5, -1),
        "right face": (0, 33.5, 1),
        "lower side": (1, 22.0, -1),
        "upper side": (1, 14.0, 1),
        "left border": (0, 4.0, 1),
        "lower border": (1, 60.0, -1),
    }[line]
    keys = jr.split(jr.key(2), 1000)
    after = np.asarray(step(state(*start), jnp.array(action, float), keys))
    back = (after[:, axis] - place) * near
    assert back.min() > 0 and abs(np.sqrt(np.mean(back**2)) - 0.5) < 0.05
    # Along the line: where the path meets it.
    fraction = (place - start[axis]) / (MAX_STEP * action[axis])
    expected = start[1 - axis] + fraction * MAX_STEP * action[1 - axis]
    np.testing.assert_allclose(after[:, 1 - axis], expected, atol=1e-4)


def test_free_paths_are_exact_and_actions_are_clipped():
    keys = jr.split(jr.key(0), 1000)
    for action in ((0.5, -1.0), (0.5, -7.0)):
        after = step(state(20.0, 40.0), jnp.array(action), keys)
        np.testing.assert_allclose(after, [state(20 + MAX_STEP / 2, 40 - MAX_STEP)] * 1000, rtol=1e-6)
    through_the_door = step(state(31.0, 18.0), jnp.array([1.0, 0.0]), keys)
    np.testing.assert_allclose(through_the_door, [state(31 + MAX_STEP, 18.0)] * 1000, rtol=1e-6)


def test_the_expert_reaches_every_goal():
    assert collect(RANDOM, Expert(), 400, jr.key(3), 101).length.max() <= 100


def test_an_image_shows_dot_and_walls():
    image = np.asarray(FIXED.render(state(20.0, 40.0)))
    assert image.shape == (65, 65, 2) and image.dtype == np.uint8
    assert image[40, 20, 0] == 255 and image[40, 21, 0] == int(255 * np.exp(-1 / (2 * 1.3**2)))
    walls = image[:, :, 1]
    assert (walls[[4, 60]] == 255).all() and (walls[:, [4, 60]] == 255).all()
    assert (walls[14:23, 31:34] == 0).all() and (walls[23:, 31:34] == 255).all() and (walls[:14, 31:34] == 255).all()


def test_images_have_the_published_mean_and_deviation():
    """The numbers that the reference normalizes by, of images whose channels are scaled to [0, 1] each."""
    draw = jax.jit(jax.vmap(lambda key: RANDOM.render(RANDOM.reset(key)[0])))
    images = np.asarray(draw(jr.split(jr.key(4), 300))).astype(float)
    images = images / images.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(images.mean((0, 1, 2)), [0.0026, 0.0989], atol=1e-4)
    np.testing.assert_allclose(images.std((0, 1, 2)), [0.0369, 0.2986], atol=5e-4)
