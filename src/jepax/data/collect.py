"""`jepax collect ENV --out FOLDER`: simulates episodes of an environment and writes them as plain files.

All episodes are simulated first, which is quick; frames are rendered and written in parts. Rerunning the command
continues an interrupted folder, to the bytes that it would have had.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import jepax
from jepax.data.episodes import Episodes, write_episodes
from jepax.data.simulate import MAX_STEPS, POLICIES, frame_shape, make_environment, render, simulate

PART_BYTES = 100_000_000
"""Frames of a part, at most, unless one episode has more: what is in memory, and what an interruption loses."""


@dataclass(frozen=True)
class CollectConfig:
    """Settings of a folder of episodes: `jepax collect --help` describes them."""

    policy: str = "expert"
    num_episodes: int = 2000
    image_size: int | None = None
    max_steps: int = MAX_STEPS
    seed: int = 0


def collect(environment: str, folder: Path, config: CollectConfig, print: Callable[[str], None] = print) -> None:
    """Collects episodes into `folder`, or continues there.

    Raises `UserError` for an image size that the environment does not draw, and if `folder` has other content.
    """
    began = time.perf_counter()
    env = make_environment(environment, config.image_size)
    found = simulate(env, POLICIES[config.policy], config.num_episodes, config.seed, max_steps=config.max_steps)
    settings = {
        "environment": environment,
        "policy": config.policy,
        "seed": config.seed,
        "episodes": config.num_episodes,
        "max_steps": config.max_steps,
        "image_size": env.image_size,
        "jepax": jepax.__version__,
    }

    # Parts of as many episodes as surely fit: the sizes depend on nothing that differs when it is run again.
    frame_bytes = math.prod(frame_shape(env))
    per_part = max(1, PART_BYTES // (frame_bytes * (config.max_steps + 1)))

    def make_part(number: int) -> Episodes:
        first = number * per_part
        part = found.take(np.arange(first, min(first + per_part, len(found))))
        return Episodes(part.actions, part.states, part.lengths, render(env, part.states))

    rows, size = len(found.states), len(found.states) * frame_bytes / 1e6
    text = f"{folder}: {len(found):,} episodes of {environment} ({config.policy}, seed {config.seed}), {rows:,} frames"
    if write_episodes(folder, settings, -(-len(found) // per_part), make_part):
        print(f"{text}, {size:,.0f} MB, {time.perf_counter() - began:.0f} s")
    else:
        print(f"{text}: was complete already")
