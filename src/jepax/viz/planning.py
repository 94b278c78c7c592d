"""Plots what a world model does when it plans: its episodes, its distances, and what it imagines.

Positions are the first two numbers of a state, x to the right and y down; worlds with fewer numbers have no maps.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from jepax.data.simulate import render
from jepax.evals.agents import ModelCost
from jepax.evals.world_model import embed_frames
from jepax.training.planning import Played
from jepax.viz.curves import BLUE, INK, ORANGE
from jepax.viz.episodes import Shown, animate, choose_episodes, plot_episodes, save_gif
from jepax.viz.figures import save_figure
from jepax.viz.sheets import DPI

MAP_INCHES, MAP_CELLS = 3.0, 24
"""Width of a map in inches, and the number of its cells across."""


def draw_planning(played: Played, run: Path) -> list[Path]:
    """Draws the figures of the trained model's plans into `run`/figures, each atomically, and returns their paths.

    - episode.png: images of some episodes, after each plan; episode.gif: every image of one of them.
    - distance.png: the distance to three goals, as the model and as the world has it.
    - imagined.png: the first plan of some episodes, as imagined and as it happened.
    """
    shown, folder = choose_episodes(played), run / "figures"
    one = next((each for each in reversed(shown) if each.reached is not None), shown[-1])
    figures = {"episode.png": plot_episodes(played, shown)}
    if played.agent.cost.env.state_dim >= 2:
        z = embed_frames(played.agent.cost.model, played.frames)
        figures |= {"distance.png": plot_distances(played, z), "imagined.png": plot_imagined(played, shown, z)}
    paths = [save_figure(figure, folder / name) for name, figure in figures.items()]
    return [*paths, save_gif(animate(played, one), folder / "episode.gif")]


def plot_distances(played: Played, z: Float[np.ndarray, "frames dim"]) -> Figure:
    """One column per goal: the mean distance from it of the frames in each cell, of embeddings and of states.

    The rank correlation of both is inside the goal's region: a planner relies on it there.
    """
    env, model = played.agent.cost.env, played.agent.cost.model
    goals = played.tasks["same_region"].goal[:3]  # drawn at random, not from the data
    embedded = np.linalg.norm(z - embed_frames(model, render(env, goals))[:, None], axis=2)
    states = jnp.asarray(played.states)
    true = np.stack([jax.vmap(env.distance, (0, None))(states, jnp.asarray(goal)) for goal in goals])

    figure, axes = _maps(2, len(goals))
    for row, values, name in zip(axes, (embedded, true), ("of embeddings", "in the world"), strict=True):
        for cell, goal, value in zip(row, goals, values, strict=True):
            style = {"gridsize": MAP_CELLS, "cmap": "viridis", "linewidths": 0.2, "vmin": 0, "vmax": values.max()}
            drawn = cell.hexbin(*played.states[:, :2].T, C=value, **style)
            cell.plot(*goal[:2], "*", color="white", markeredgecolor=INK, markersize=14)
        bar = figure.colorbar(drawn, ax=row, shrink=0.9)
        bar.set_label(f"distance {name}", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    for cell, goal, *distances in zip(axes[0], goals, embedded, true, strict=True):
        here = jax.vmap(env.region)(states) == env.region(jnp.asarray(goal))
        correlation = spearmanr(*(np.asarray(each)[here] for each in distances)).statistic
        cell.set_title(f"rank correlation {correlation:.2f} in the goal's region", fontsize=9)
    return figure


def plot_imagined(played: Played, shown: list[Shown], z: Float[np.ndarray, "frames dim"]) -> Figure:
    """The first plan of each episode: the states it led to, and those whose embeddings are the nearest to predictions.

    Gray: the states of held-out frames, among which the nearest is looked for.
    """
    env, skip = played.agent.cost.env, played.agent.scale.frame_skip
    size = min(played.agent.planner.horizon, len(shown[0].actions) // skip) * skip
    figure, axes = _maps(-(-len(shown) // 3), min(len(shown), 3))
    for cell, each in zip(axes.flat, shown, strict=False):
        real = each.states[: size + 1]
        predicted = np.asarray(imagine(played, real[0], each.actions[:size]))
        nearest = np.argmin(np.linalg.norm(predicted[:, None] - z, axis=2), axis=1)
        imagined = played.states[nearest]
        error = float(jnp.mean(jax.vmap(env.distance)(jnp.asarray(imagined[1:]), jnp.asarray(real[skip::skip]))))

        cell.plot(*played.states[:, :2].T, ".", color="0.88", markersize=2)
        cell.plot(*real[:, :2].T, color=INK, linewidth=1.4, marker="o", markersize=4, markevery=skip, label="real")
        cell.plot(*imagined[:, :2].T, color=ORANGE, linewidth=1.4, marker="o", markersize=4, label="imagined")
        cell.plot(*each.goal[:2], "*", color=BLUE, markersize=12, label="goal")
        cell.set_title(f"{each.task}: {each.result}; error {error:.1f}", fontsize=9)
    for cell in axes.flat[len(shown) :]:
        cell.set_axis_off()
    axes[0, 0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def imagine(
    played: Played, start: Float[np.ndarray, "state"], actions: Float[np.ndarray, "steps action"]
) -> Float[Array, "frames dim"]:
    """The embedding of a start, and the model's predictions after each block of these actions."""
    scale, cost = played.agent.scale, played.agent.cost
    blocks = (actions - np.asarray(scale.mean)) / np.asarray(scale.std)
    return _imagine(cost, jnp.asarray(start), jnp.asarray(blocks.reshape(-1, scale.block), jnp.float32))


@eqx.filter_jit
def _imagine(
    cost: ModelCost, start: Float[Array, "state"], blocks: Float[Array, "horizon block"]
) -> Float[Array, "frames dim"]:
    z = cost.model.embed(cost.env.render(start)[None])
    return cost.model.rollout(z, blocks[:0], blocks[None], cost.window)[0]


def _maps(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of square maps, y down."""
    size = (columns * MAP_INCHES + 0.8, rows * (MAP_INCHES + 0.2))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for cell in axes.flat:
        _style_map(cell)
    return figure, axes


def _style_map(axes: Axes) -> None:
    axes.set_box_aspect(1)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
