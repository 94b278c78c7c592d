"""Two-Room of PLDM and eb_jepa: 65 px, a wall that may differ per episode, and collisions with chance.

    next = position + MAX_STEP * clip(action, -1, 1)
    next = where that path first meets a wall, moved back from it by |noise|, noise ~ N(0, 0.5 px)

Source: Sobal et al. 2025 (PLDM, arXiv:2502.14819) and eb_jepa, which use the same world. Positions and lengths are in
pixels, x to the right and y down. *Differs from the reference:* an action is a fraction of `MAX_STEP`, not a number of
pixels, so that it is in [-1, 1] as in every environment.
"""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.envs.base import Action, Environment, Image, State, unit_vector

IMAGE_SIZE = 65
LOW, HIGH = 4.0, 60.0  # the border lines
WALL_HALF = 1.5  # half of the wall's thickness of 3 pixels
DOOR_HALF = 4.0  # half of the door's length
WALL_X = (20, 44)  # first and last column of a random wall
DOOR_Y = (10, 54)  # first and last row of a random door
FIXED = (32, 18)  # column of the fixed wall, row of its door
MARGIN = 1.0  # starts and goals are this far from walls
MAX_STEP = 2.45  # pixels of a step along an axis whose action is 1: the longest step of the published planner
NOISE = 0.5  # standard deviation of the distance from a wall after a collision
CLEARANCE = 1e-3  # smallest distance from it, so that every position is on one side of a wall
DOT = 1.3  # standard deviation of the dot
ALIGNED = 2.0  # the expert enters the door within this distance of its center line


class TwoRoomPLDM(Environment):
    """Two rooms; a state is (x, y, wall_x, door_y): the agent's position, the wall's column and its door's row.

    An image has two channels: the agent's dot, and the walls.
    """

    state_dim: ClassVar[int] = 4
    action_dim: ClassVar[int] = 2
    goal_radius: ClassVar[float] = 4.5
    num_regions: ClassVar[int] = 2
    image_size: int = eqx.field(static=True, default=IMAGE_SIZE, init=False)
    random_walls: bool = eqx.field(static=True, default=False)
    """Draw the wall and the door of each episode; else they are `FIXED`."""

    def reset(self, key: PRNGKeyArray) -> tuple[State, State]:
        """A start and a goal, uniform in different rooms."""
        key_wall, key_door, key_side, key_start, key_goal = jr.split(key, 5)
        wall = jnp.asarray(FIXED, jnp.float32)
        if self.random_walls:
            columns, rows = (WALL_X[0], WALL_X[1] + 1), (DOOR_Y[0], DOOR_Y[1] + 1)
            wall = jnp.stack([jr.randint(key_wall, (), *columns), jr.randint(key_door, (), *rows)]).astype(jnp.float32)

        start_is_left = jr.bernoulli(key_side)
        start = sample_position(key_start, wall[0], start_is_left)
        goal = sample_position(key_goal, wall[0], ~start_is_left)
        return jnp.concatenate([start, wall]), jnp.concatenate([goal, wall])

    def step(self, state: State, action: Action, key: PRNGKeyArray) -> State:
        position, wall = state[:2], state[2:]
        moved = position + MAX_STEP * jnp.clip(action, -1, 1)
        moved = collide(position, moved, wall, jnp.abs(NOISE * jr.normal(key)))
        return jnp.concatenate([moved, wall])

    def render(self, state: State) -> Image:
        x, y, wall_x, door_y = state
        pixels = jnp.arange(IMAGE_SIZE)
        dot = jnp.exp(-((pixels - x) ** 2 + (pixels - y)[:, None] ** 2) / (2 * DOT**2))

        # The wall and the border lines have the full length of the image.
        wall = (jnp.abs(pixels - wall_x) <= WALL_HALF) & (jnp.abs(pixels - door_y) > DOOR_HALF)[:, None]
        on_line = (pixels == LOW) | (pixels == HIGH)
        walls = wall | on_line | on_line[:, None]
        return (255 * jnp.stack([dot, walls], axis=-1)).astype(jnp.uint8)

    def distance(self, state: State, goal: State) -> Float[Array, ""]:
        """The distance of the positions in pixels, through the wall."""
        return jnp.linalg.norm(state[:2] - goal[:2])

    def region(self, state: State) -> Int[Array, ""]:
        """0 left of the wall, 1 right of it."""
        return (state[0] > state[2]).astype(jnp.int32)

    def expert(self, state: State, goal: State) -> Action:
        """The unit vector to the goal; if that is in the other room, to this end of the door, then to the other."""
        x, y, wall_x, door_y = state
        goal_side = jnp.where(goal[0] < wall_x, -1.0, 1.0)
        to_end = WALL_HALF + MARGIN  # from the wall's center line to a point in front of the door

        # Through the door, once it lies straight ahead or the agent is in it.
        ahead = (jnp.abs(y - door_y) < ALIGNED) | (jnp.abs(x - wall_x) <= WALL_HALF)
        door = jnp.stack([wall_x + jnp.where(ahead, goal_side, -goal_side) * to_end, door_y])
        is_behind = goal_side * (x - wall_x) < WALL_HALF
        return unit_vector(jnp.where(is_behind, door, goal[:2]) - state[:2])


def sample_position(key: PRNGKeyArray, wall_x: Float[Array, ""], is_left: Bool[Array, ""]) -> Float[Array, "2"]:
    """A position, uniform in the room left or right of the wall, at least `MARGIN` from its walls."""
    left = jnp.where(is_left, LOW, wall_x + WALL_HALF) + MARGIN
    right = jnp.where(is_left, wall_x - WALL_HALF, HIGH) - MARGIN
    low, high = jnp.stack([left, LOW + MARGIN]), jnp.stack([right, HIGH - MARGIN])
    return low + (high - low) * jr.uniform(key, (2,))


def collide(
    start: Float[Array, "2"], end: Float[Array, "2"], wall: Float[Array, "2"], rebound: Float[Array, ""]
) -> Float[Array, "2"]:
    """The end of a path, or the place of its first collision, moved back by `rebound` pixels across what it met."""
    # (2 axes, 4 lines): borders, then for x the faces of the wall, for y the sides of the door.
    halves = jnp.array([WALL_HALF, DOOR_HALF])
    lines = jnp.stack([jnp.full(2, LOW), jnp.full(2, HIGH), wall - halves, wall + halves], axis=1)
    is_below = start[:, None] < lines
    crosses = is_below != (end[:, None] < lines)

    # Fraction of the path before each line, and there the distance along the line from the center of door or wall.
    change = (end - start)[:, None]
    fraction = jnp.where(crosses, (lines - start[:, None]) / jnp.where(change == 0, 1.0, change), jnp.inf)
    along = (start - wall)[::-1, None] + jnp.where(crosses, fraction, 0.0) * change[::-1]

    # A face has a hole, the door, whose sides are as long as the wall is thick. They overlap a little at corners.
    overlap = CLEARANCE / 2
    is_face, is_side = jnp.abs(along[0]) >= DOOR_HALF - overlap, jnp.abs(along[1]) <= WALL_HALF + overlap
    is_solid = jnp.stack([is_face, is_side]) | (jnp.arange(4) < 2)

    # Stop at the first line, and go back to the side of the start.
    fraction = jnp.where(is_solid, fraction, jnp.inf)
    axis, line = jnp.unravel_index(jnp.argmin(fraction), fraction.shape)
    back = jnp.where(is_below[axis, line], -1.0, 1.0) * (rebound + CLEARANCE)
    hit = jnp.isfinite(fraction[axis, line])
    stopped = start + jnp.where(hit, fraction[axis, line], 0.0) * change[:, 0]
    moved = jnp.where(hit, stopped.at[axis].set(lines[axis, line] + back), end)
    return jnp.clip(moved, LOW + CLEARANCE, HIGH - CLEARANCE)
