"""Policies: their actions' distributions, and the first step of an episode."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.envs import Expert, NoisyExpert, RandomPolicy, TwoRoom, TwoRoomPLDM, VonMisesWalk

ENV, NONE = TwoRoom(32), jnp.zeros(2)
STATE, GOAL = jnp.array([50.0, 60.0]), jnp.array([80.0, 100.0])  # the direction (0.6, 0.8)


def actions(policy, last=NONE, count=4000, env=ENV, state=STATE, goal=GOAL):
    keys = jr.split(jr.key(0), count)
    return np.asarray(
        jax.jit(jax.vmap(policy, (None, None, None, None, 0)), static_argnums=0)(env, state, goal, last, keys)
    )


@pytest.mark.parametrize("policy", [RandomPolicy(), Expert(), NoisyExpert()], ids=lambda policy: type(policy).__name__)
def test_actions_are_in_range(policy):
    assert np.abs(actions(policy)).max() <= 1


def test_random_actions_are_uniform():
    drawn = actions(RandomPolicy())
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(drawn.std(0), 3**-0.5, atol=0.02)


def test_an_expert_without_noise_is_the_expert():
    np.testing.assert_allclose(actions(Expert(), count=1), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(actions(NoisyExpert(noise_std=0.0, repeat_prob=0.0), count=1), [[0.6, 0.8]], rtol=1e-6)


def test_noise_is_added_before_the_clip():
    small = actions(NoisyExpert(noise_std=0.05))
    np.testing.assert_allclose(small.mean(0), [0.6, 0.8], atol=0.01)
    np.testing.assert_allclose(small.std(0), 0.05, atol=0.005)
    # P(0.8 + 2 n >= 1) = 0.46 of the actions are at the upper limit.
    assert abs(np.mean(actions(NoisyExpert())[:, 1] == 1) - 0.46) < 0.03


def test_actions_repeat_but_never_the_one_before_the_first():
    last = jnp.array([0.3, -0.2])
    assert abs(np.mean((actions(NoisyExpert(), last) == last).all(1)) - 0.05) < 0.015
    assert not (actions(NoisyExpert()) == 0).all(1).any()


def test_a_walk_turns_by_von_mises_angles():
    drawn = {
        name: actions(VonMisesWalk(), last, env=TwoRoomPLDM(), state=jnp.ones(4), goal=jnp.ones(4))
        for name, last in (("first", NONE), ("next", jnp.array([0.0, 0.5])))
    }
    for walk in drawn.values():  # pixels, in [0.2, 1.8]
        lengths = 2.45 * np.linalg.norm(walk, axis=1)
        assert 0.19 < lengths.min() and lengths.max() < 1.81 and abs(lengths.mean() - 1) < 0.03
        assert abs(lengths.std() - 0.4 * 0.774**0.5) < 0.02  # a normal truncated at 2 deviations has variance 0.774
    angles = {name: np.arctan2(walk[:, 1], walk[:, 0]) for name, walk in drawn.items()}
    assert abs(angles["first"].std() - np.pi / 3**0.5) < 0.05
    # Mean resultant length I1(5) / I0(5) = 0.8934, around the last direction.
    turns = angles["next"] - np.pi / 2
    np.testing.assert_allclose([np.cos(turns).mean(), np.sin(turns).mean()], [0.8934, 0], atol=0.03)
