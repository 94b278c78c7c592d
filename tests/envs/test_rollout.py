"""Episodes: where they end, what follows, and the published numbers of Two-Room's data."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.envs import ENVIRONMENTS, Environment, Expert, NoisyExpert, TwoRoom, TwoRoomPLDM, collect, rollout

ENV = TwoRoom(32)
START = jnp.array([30.0, 100.0])


@pytest.fixture(scope="module")
def data():
    return jax.tree.map(np.asarray, collect(ENV, NoisyExpert(), 2000, jr.key(0), 100))


@jax.jit
def expert_episode(goal):
    return rollout(ENV, Expert(), START, goal, jr.key(0), 10)


def test_an_episode_ends_at_its_goal():
    episode = expert_episode(jnp.array([80.0, 100.0]))
    assert episode.states.shape == (11, 2) and episode.actions.shape == (10, 2)
    assert episode.length == 7  # 50 - 7 * 5 < 16
    np.testing.assert_array_equal(episode.actions, np.repeat([[1, 0], [0, 0]], [7, 3], axis=0))
    np.testing.assert_allclose(episode.states[:, 0], [*range(30, 66, 5), 65, 65, 65])


def test_a_start_at_the_goal_takes_one_step():
    assert expert_episode(START).length == 1


def test_an_episode_that_does_not_reach_its_goal_has_every_step():
    episode = expert_episode(jnp.array([30.0, 200.0]))
    assert episode.length == 10
    np.testing.assert_allclose(episode.actions, [[0, 1]] * 10, atol=1e-6)


def test_states_follow_from_actions_and_stay_after_the_end(data):
    step = jax.jit(jax.vmap(jax.vmap(ENV.step, (0, 0, None)), (0, 0, None)))
    running = np.arange(100) < data.length[:, None]
    after = np.where(running[..., None], step(data.states[:, :-1], data.actions, jr.key(0)), data.states[:, :-1])
    np.testing.assert_allclose(data.states[:, 1:], after, rtol=1e-6)
    assert (data.actions[~running] == 0).all() and (data.actions[running] != 0).any(-1).all()


def test_a_key_gives_the_same_episodes(data):
    again, other = (collect(ENV, NoisyExpert(), 2000, jr.key(seed), 100) for seed in (0, 1))
    np.testing.assert_array_equal(again.states, data.states)
    assert not (np.asarray(other.states) == data.states).all(axis=(1, 2)).any()


def test_data_of_the_noisy_expert_have_the_published_numbers(data):
    """Mean length 61, 30% of the episodes with all 100 steps, deviation of the actions 0.87."""
    actions = data.actions[np.arange(100) < data.length[:, None]]
    assert 58 <= data.length.mean() <= 65 and 0.86 <= actions.std() <= 0.88
    assert 0.25 <= np.mean(data.length == 100) <= 0.35


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_follows_the_contract(name):
    env = ENVIRONMENTS[name]()

    @jax.jit
    def use(key):
        start, goal = env.reset(key)
        after = env.step(start, env.expert(start, goal), key)
        return start, goal, after, env.render(after), env.distance(goal, goal), env.reached(goal, goal)

    start, goal, after, image, distance, reached = use(jr.key(0))
    assert isinstance(env, Environment) and start.shape == goal.shape == after.shape == (env.state_dim,)
    assert image.shape[:2] == (env.image_size, env.image_size) and distance == 0 and reached


def test_environments_by_name():
    assert ENVIRONMENTS == {"two_room": TwoRoom, "two_room_pldm": TwoRoomPLDM}
