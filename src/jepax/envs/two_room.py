"""Two-Room: an agent, two rooms, and a wall between them that has a door.

    moved = clip(position + speed * clip(action, -1, 1), to the inside of the borders)
    next  = moved, or the near side of the wall if `moved` is in or behind the wall and not at a door

Source: Two-Room of stable-worldmodel (commit addbab4), on which LeWorldModel is evaluated; constants and rules are its
own. `tests/parity/test_two_room.py` compares steps, expert and images. All positions and lengths are in pixels of the
room of 224 px, x to the right and y down, whatever the size of the image.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.envs.base import Action, Environment, Image, State, unit_vector
from jepax.errors import UserError, check_fields

ROOM = 224  # width and height of the room, as wide as the large image
WALL = 112.0  # center line of the wall
BORDER = 14  # width of the border that the agent does not touch
BORDER_LINES = (10, 210)  # first pixel of the two black lines of each axis
LINE_WIDTH = 4
DOOR_MARGIN = 1.75  # an agent this far from an edge of the door still passes
PUSH = 0.5  # distance from the wall of an agent that ran into it
AT_DOOR = 10.5  # within this distance of a door the expert turns to the goal
RED = np.array([255.0, 0.0, 0.0])


@dataclass(frozen=True)
class TwoRoomLayout:
    """The wall, its doors and the agent; all lengths in pixels of the room."""

    wall: Literal["vertical", "horizontal"] = "vertical"
    """Direction of the wall."""
    wall_thickness: int = 10
    """Half of it, rounded down, is black on each side of the center line."""
    door_centers: tuple[float, ...] = (49.0,)
    """Position of each door along the wall."""
    door_half_sizes: tuple[float, ...] = (14.0,)
    """Half the length of each door's opening."""
    radius: float = 7.0
    """Radius of the agent: its distance from walls, and the standard deviation of its dot."""
    speed: float = 5.0
    """Distance of a step along an axis whose action is 1."""

    def __post_init__(self) -> None:
        check_fields("layout", self, "at least 1", "wall_thickness")
        check_fields("layout", self, "above 0", "radius", "speed")
        if len(self.door_centers) != len(self.door_half_sizes):
            raise UserError(
                f"layout.door_centers={self.door_centers} and layout.door_half_sizes={self.door_half_sizes}"
                " differ in length: each door has one of both"
            )
        if not any(self.fits):
            raise UserError(
                f"layout.door_half_sizes={self.door_half_sizes}: no door fits the agent of layout.radius={self.radius};"
                f" one must be at least {1.1 * self.radius:g}"
            )

    @property
    def across(self) -> int:
        """Axis of a position that crosses the wall: 0 is x, 1 is y."""
        return 0 if self.wall == "vertical" else 1

    @property
    def gap(self) -> float:
        """Smallest distance of the agent from the wall's center line, outside a door."""
        return self.wall_thickness // 2 + self.radius

    @property
    def fits(self) -> tuple[bool, ...]:
        """True for each door that the expert uses."""
        return tuple(half >= 1.1 * self.radius for half in self.door_half_sizes)


class TwoRoom(Environment):
    """Two rooms; a state is the agent's position (x, y). Deterministic: `step` does not use its key.

    In the default layout every goal can be reached. In a thicker wall, goals near its center line cannot.
    """

    state_dim: ClassVar[int] = 2
    action_dim: ClassVar[int] = 2
    goal_radius: ClassVar[float] = 16.0
    num_regions: ClassVar[int] = 2
    image_size: int = eqx.field(static=True, default=224)
    layout: TwoRoomLayout = eqx.field(static=True, default=TwoRoomLayout())

    def __check_init__(self) -> None:
        if self.image_size not in (32, ROOM):
            raise UserError(f"image_size={self.image_size}: Two-Room draws images of 32 or {ROOM} pixels")

    def reset(self, key: PRNGKeyArray) -> tuple[State, State]:
        """A start, uniform outside the band of the wall, and a goal, uniform in both rooms."""
        key_start, key_goal = jr.split(key)
        low, high = BORDER, ROOM - BORDER - 1
        goal = jr.uniform(key_goal, (2,), minval=low, maxval=high)

        # The start is drawn from a room without the band; positions behind the wall are then moved by its width.
        gap, across = self.layout.gap, np.arange(2) == self.layout.across
        start = jr.uniform(key_start, (2,), minval=low, maxval=high - 2 * gap * across)
        start = start + jnp.where(across & (start > WALL - gap), 2 * gap, 0.0)
        return start, goal

    def step(self, state: State, action: Action, key: PRNGKeyArray) -> State:
        layout = self.layout

        # Move, but not into the borders.
        edge = BORDER + layout.radius
        moved = jnp.clip(state + layout.speed * jnp.clip(action, -1, 1), edge, ROOM - edge)

        # Outside a door the wall puts the agent back on its side: also one that leaves the door sideways.
        near_side = jnp.where(state[layout.across] < WALL, -1.0, 1.0)
        into_wall = near_side * (moved[layout.across] - WALL) < layout.gap
        stopped = moved.at[layout.across].set(WALL + near_side * (layout.gap + PUSH))
        return jnp.where(into_wall & ~self._at_door(moved), stopped, moved)

    def render(self, state: State) -> Image:
        """The agent as a red dot; at 32 px a pixel shows the mean of the walls in its 7 x 7 pixels of the room.

        A dot is exp(-d^2 / 2 radius^2) over its value at the nearest pixel of the room, d from a pixel's center.
        """
        cell = ROOM // self.image_size
        centers = cell * jnp.arange(self.image_size) + (cell - 1) / 2
        squared = (centers - state[0]) ** 2 + ((centers - state[1]) ** 2)[:, None]  # (y, x)
        nearest = jnp.sum((state - jnp.round(state)) ** 2)
        alpha = jnp.exp((nearest - squared) / (2 * self.layout.radius**2))[..., None]
        background = draw_walls(self.layout, self.image_size)[..., None]
        return (background + alpha * (RED - background)).astype(jnp.uint8)

    def distance(self, state: State, goal: State) -> Float[Array, ""]:
        """The distance in pixels of the room, through the wall."""
        return jnp.linalg.norm(state - goal)

    def region(self, state: State) -> Int[Array, ""]:
        """0 and 1 for the two rooms."""
        return (state[self.layout.across] > WALL).astype(jnp.int32)

    def expert(self, state: State, goal: State) -> Action:
        """The unit vector to the goal; if that is in the other room, to the nearest door that fits, until there."""
        layout = self.layout

        # (doors, 2): the doors that fit, on the wall's center line.
        doors = np.full((sum(layout.fits), 2), WALL)
        doors[:, 1 - layout.across] = np.asarray(layout.door_centers)[np.asarray(layout.fits)]
        to_doors = doors - state
        distances = jnp.linalg.norm(to_doors, axis=1)

        behind = self.region(state) != self.region(goal)
        via_door = behind & (jnp.min(distances) > AT_DOOR)
        return unit_vector(jnp.where(via_door, to_doors[jnp.argmin(distances)], goal - state))

    def _at_door(self, position: State) -> Bool[Array, ""]:
        """True if the agent is inside the length of a door, whatever its distance from the wall."""
        from_center = jnp.abs(position[1 - self.layout.across] - np.asarray(self.layout.door_centers))
        return jnp.any(from_center <= np.asarray(self.layout.door_half_sizes) + DOOR_MARGIN)


def draw_walls(layout: TwoRoomLayout, image_size: int) -> Float[np.ndarray, "height width"]:
    """The room without an agent: 255 is white, 0 is black; each pixel the mean of those it stands for."""
    # The wall, and its doors, as positions across and along it.
    pixels = np.arange(ROOM)
    in_wall = np.abs(pixels - WALL) <= layout.wall_thickness // 2
    from_doors = np.abs(pixels[:, None] - np.asarray(layout.door_centers))
    in_door = np.any(from_doors <= np.asarray(layout.door_half_sizes), axis=1)
    black = ~in_door[:, None] & in_wall[None, :]
    if layout.wall == "horizontal":
        black = black.T

    # The four border lines have the full length of the image.
    on_line = np.any([(pixels >= first) & (pixels < first + LINE_WIDTH) for first in BORDER_LINES], axis=0)
    black = black | on_line[:, None] | on_line[None, :]

    cell = ROOM // image_size
    return 255.0 * (1 - black.reshape(image_size, cell, image_size, cell).mean(axis=(1, 3), dtype=np.float32))
