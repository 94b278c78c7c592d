"""Plots episodes of a planner: images after each plan, and all of one episode as an animation.

Nothing is chosen by its looks: of every task, the first episode that reaches the goal and the first that does not.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image

from jepax.data.simulate import render
from jepax.evals.planning import starts_inside
from jepax.training.planning import Played
from jepax.viz.figures import save_atomically
from jepax.viz.sheets import MASK_INCHES, draw_image, make_sheet

GIF_PIXELS, GIF_GAP, GIF_GRAY = 224, 16, 200
"""Least width of an animated image, width and gray of the gap before the goal."""
GIF_MS, GIF_END_MS = 80, 1500
"""Milliseconds of a frame, and of the last one."""


class Shown(NamedTuple):
    """One episode."""

    task: str
    states: Float[np.ndarray, "states state"]
    goal: Float[np.ndarray, "state"]
    actions: Float[np.ndarray, "steps action"]
    reached: int | None
    """Steps until the goal is reached; None: never."""

    @property
    def result(self) -> str:
        return "never reached" if self.reached is None else f"reached at step {self.reached}"


def choose_episodes(played: Played) -> list[Shown]:
    """Of every task the first success and the first failure, if there are any, that start outside the goal."""
    shown = []
    for name, task in played.tasks.items():
        outcome = jax.tree.map(np.asarray, played.outcomes[name])
        inside, _ = starts_inside(played.agent.cost.env, task)
        success = outcome.reached.any(axis=1)
        chosen = [i for kind in (success, ~success) for i in np.flatnonzero(kind & ~inside)[:1]]
        for i in chosen or [0]:
            reached = int(outcome.reached[i].argmax()) + 1 if success[i] else None
            title = name.replace("_", " ")
            shown.append(Shown(title, outcome.states[i], task.goal[i], outcome.actions[i], reached))
    return shown


def plot_episodes(played: Played, shown: list[Shown]) -> Figure:
    """One row per episode: the start, what each plan led to, and the goal."""
    agent, budget = played.agent, len(shown[0].actions)
    steps = [*range(0, budget, agent.planner.horizon * agent.scale.frame_skip), budget]
    figure, axes = make_sheet(len(shown), len(steps) + 1, MASK_INCHES, MASK_INCHES + 0.1)
    for row, each in zip(axes, shown, strict=True):
        images = to_rgb(render(agent.cost.env, np.stack([*each.states[steps], each.goal])))
        names = [f"{each.task}: start", *(f"plan {i}: step {step}" for i, step in enumerate(steps[1:], 1))]
        for cell, image, title in zip(row, images, [*names, f"goal: {each.result}"], strict=True):
            draw_image(cell, image / 255, MASK_INCHES)
            cell.set_title(title, fontsize=8, pad=2)
    return figure


def animate(played: Played, shown: Shown) -> list[Image.Image]:
    """Every image of an episode, with the goal on its right."""
    *images, goal = to_rgb(render(played.agent.cost.env, np.stack([*shown.states, shown.goal])))
    factor = -(-GIF_PIXELS // goal.shape[1])
    gap = np.full((len(goal) * factor, GIF_GAP, 3), GIF_GRAY, np.uint8)
    goal, *images = (image.repeat(factor, axis=0).repeat(factor, axis=1) for image in (goal, *images))
    return [Image.fromarray(np.concatenate([image, gap, goal], axis=1)) for image in images]


def save_gif(images: list[Image.Image], path: Path) -> Path:
    """Write an animated GIF atomically, which repeats and rests at its end."""
    durations = [GIF_MS] * (len(images) - 1) + [GIF_END_MS]
    first, *others = images
    options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    return save_atomically(path, lambda part: first.save(part, format="GIF", **options))


def to_rgb(
    images: UInt8[np.ndarray, "n height width channels"],
) -> UInt8[np.ndarray, "n height width 3"]:
    """Gray is repeated, a missing third channel is black, and channels after the third are left out."""
    if images.shape[-1] == 1:
        return images.repeat(3, axis=-1)
    missing = max(0, 3 - images.shape[-1])
    return np.pad(images, [(0, 0)] * 3 + [(0, missing)])[..., :3]
