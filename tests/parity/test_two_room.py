"""Two-Room against recorded steps, expert actions and frames of the public environment."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.envs.two_room import TwoRoom, TwoRoomLayout
from tests.parity.reference import GOLDEN, group

FILE = GOLDEN / "worldmodel" / "tworoom.npz"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no {FILE.name} in the folder of recorded numbers")


@pytest.fixture(scope="module", params=["default", "varied"])
def golden(request):
    with np.load(FILE) as file:
        return group(dict(file), f"{request.param}.")


def environment(golden, image_size=224):
    layout = TwoRoomLayout(
        wall="vertical" if golden["wall_axis"] == 1 else "horizontal",
        wall_thickness=int(golden["wall_thickness"]),
        door_centers=tuple(golden["door_centres"].tolist()),
        door_half_sizes=tuple(golden["door_half_sizes"].tolist()),
        radius=float(golden["radius"]),
        speed=float(golden["speed"]),
    )
    return TwoRoom(image_size, layout)


def test_steps_and_reached(golden):
    env, target = environment(golden), jnp.asarray(golden["target"])
    after = jax.vmap(env.step, (0, 0, None))(golden["position"], jnp.asarray(golden["action"]), jr.key(0))
    np.testing.assert_allclose(after, golden["next_position"], atol=1e-4)
    np.testing.assert_allclose(jax.vmap(env.distance)(after, target), golden["distance"], atol=1e-4)
    np.testing.assert_array_equal(jax.vmap(env.reached)(after, target), golden["reached"])
    assert 0 < golden["reached"].sum() < len(golden["reached"])


def test_expert_actions(golden):
    ours = jax.vmap(environment(golden).expert)(jnp.asarray(golden["position"]), jnp.asarray(golden["target"]))
    np.testing.assert_allclose(ours, golden["expert_action"], atol=1e-4)


def test_frames(golden):
    ours = np.asarray(jax.vmap(environment(golden).render)(jnp.asarray(golden["frame_position"])))
    assert np.abs(ours.astype(int) - golden["frame"]).max() <= 1


def test_small_frames_are_the_block_means_of_the_large_ones(golden):
    frames = golden["frame"].astype(np.float32)
    ours = np.asarray(jax.vmap(environment(golden, 32).render)(jnp.asarray(golden["frame_position"])))
    means = frames.reshape(len(frames), 32, 7, 32, 7, 3).mean(axis=(2, 4))
    error = np.abs(ours - means)
    assert error.max() <= 0.08 * 255 and error.mean() <= 0.001 * 255
