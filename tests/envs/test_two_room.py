"""Two-Room: where its start, its goal and its agent may be, what a frame shows, and layouts that are refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.envs import Expert, NoisyExpert, TwoRoom, TwoRoomLayout, collect
from jepax.types import UserError

THICK = TwoRoomLayout("horizontal", 21, (60.0, 150.0), (12.0, 20.0), radius=8.5, speed=9.0)


@pytest.fixture(params=[TwoRoomLayout(), THICK], ids=["default", "thick"])
def env(request):
    return TwoRoom(32, request.param)


def uniform_moments(positions, low, high):
    """Mean and standard deviation of positions, and of the uniform distribution of a range."""
    np.testing.assert_allclose(positions.mean(), (low + high) / 2, atol=5)
    np.testing.assert_allclose(positions.std(), (high - low) / 12**0.5, atol=3)


def test_starts_avoid_the_wall_and_goals_are_anywhere(env):
    start, goal = map(np.asarray, jax.jit(jax.vmap(env.reset))(jr.split(jr.key(0), 4000)))
    layout = env.layout
    across = start[:, layout.across]
    assert np.abs(across - 112).min() >= layout.gap
    low, high = 112 - layout.gap, 112 + layout.gap
    assert abs(np.mean(across < 112) - (low - 14) / (low - 14 + 209 - high)) < 0.03  # by the widths of the rooms
    uniform_moments(across[across < 112], 14, low)
    uniform_moments(across[across > 112], high, 209)
    for positions in (start[:, 1 - layout.across], goal[:, 0], goal[:, 1]):
        assert 14 <= positions.min() and positions.max() <= 209
        uniform_moments(positions, 14, 209)


def test_the_agent_stays_inside_and_crosses_only_at_a_door(env):
    states = np.asarray(collect(env, NoisyExpert(), 200, jr.key(1), 60).states)
    layout, moved = env.layout, states[:, 1:]
    edge = 14 + layout.radius
    assert edge <= moved.min() and moved.max() <= 224 - edge
    # Away from the doors every position is outside the band of the wall, and a step that changes sides ends at a door.
    across, along = moved[..., layout.across], moved[..., 1 - layout.across]
    from_doors = np.abs(along[..., None] - np.array(layout.door_centers)) - np.array(layout.door_half_sizes)
    at_door = (from_doors <= 1.75).any(-1)
    changed = (states[:, :-1, layout.across] < 112) != (across < 112)
    assert np.abs(across - 112)[~at_door].min() >= layout.gap and at_door[changed].all() and changed.sum() > 20


def test_an_agent_that_leaves_the_door_sideways_is_put_back():
    env, down = TwoRoom(), jnp.array([0.0, 1.0])
    for x, expected in ((110.0, 99.5), (114.0, 124.5)):
        np.testing.assert_allclose(env.step(jnp.array([x, 63.0]), down, jr.key(0)), [expected, 68.0])
        np.testing.assert_allclose(env.step(jnp.array([x, 59.0]), down, jr.key(0)), [x, 64.0])


def test_the_expert_reaches_every_goal():
    assert collect(TwoRoom(), Expert(), 400, jr.key(2), 101).length.max() <= 100


def test_the_expert_at_its_goal_does_nothing():
    position = jnp.array([50.0, 60.0])
    np.testing.assert_array_equal(TwoRoom().expert(position, position), [0, 0])


def test_a_frame_shows_walls_and_agent():
    frame = np.asarray(TwoRoom().render(jnp.array([60.0, 150.0])))
    assert frame.shape == (224, 224, 3) and frame.dtype == np.uint8
    assert frame[150, 60].tolist() == [255, 0, 0] and frame[0, 0].tolist() == [255] * 3
    assert (frame[100, 107:118] == 0).all() and (frame[35:64, 107:118] == 255).all()  # wall and door
    assert (frame[10:14] == 0).all() and (frame[:, 210:214] == 0).all() and (frame[34, 107:118] == 0).all()


@pytest.mark.parametrize("position", [(60.0, 150.0), (60.5, 150.5), (112.0, 49.0), (21.0, 203.0)])
def test_a_small_frame_is_the_block_mean_of_the_large_one(position):
    small, large = (np.asarray(TwoRoom(size).render(jnp.array(position))).astype(np.float32) for size in (32, 224))
    error = np.abs(small - large.reshape(32, 7, 32, 7, 3).mean((1, 3)))
    assert error.max() <= 0.08 * 255 and error.mean() <= 0.001 * 255


def test_environments_are_static_arguments():
    step = jax.jit(lambda env, state: env.step(state, jnp.ones(2), jr.key(0)), static_argnums=0)
    np.testing.assert_array_equal(step(TwoRoom(), jnp.array([50.0, 50.0])), [55, 55])
    np.testing.assert_array_equal(step(TwoRoom(layout=THICK), jnp.array([50.0, 50.0])), [59, 59])
    assert hash(TwoRoom(32)) == hash(TwoRoom(32)) and TwoRoom(32) == TwoRoom(32) != TwoRoom(224)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wall_thickness": 0}, "layout.wall_thickness=0 must be at least 1"),
        ({"speed": 0.0}, "layout.speed=0.0 must be above 0"),
        ({"door_centers": (49.0, 80.0)}, "differ in length"),
        ({"radius": 14.0}, "no door fits .* at least 15.4"),
    ],
)
def test_layouts_that_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TwoRoomLayout(**settings)


def test_other_image_sizes_are_refused():
    with pytest.raises(UserError, match="image_size=64: Two-Room draws images of 32 or 224 pixels"):
        TwoRoom(64)
