"""`jepax collect`: episodes of an environment, in a folder of plain files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jepax.commands.base import Command
from jepax.errors import UserError


@dataclass(frozen=True)
class Collect(Command):
    """Simulate episodes of an environment into a folder of plain files, for data.dataset episodes.

    The same command again resumes an interrupted collection.

    For example: jepax collect two_room --image-size 32 --out EPISODES
    """

    environment: Annotated[str, tyro.conf.arg(metavar="ENV")]
    """An environment, such as two_room."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: episodes/ENV)")] = None
    """Folder that is written."""
    policy: Literal["expert", "random"] = "expert"
    """What acts: the environment's expert with noise, or uniformly random actions."""
    num_episodes: int = 2000
    """Number of episodes."""
    image_size: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the environment's)")] = None
    """Height and width of a frame in pixels."""
    max_steps: int = 100
    """Actions of an episode that does not reach its goal."""
    seed: int = 0
    """Seed of starts, goals and actions."""

    def __post_init__(self) -> None:
        for name in ("num_episodes", "image_size", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must be from 0 to 2^32 - 1")

    def run(self) -> None:
        from jepax.data import collect
        from jepax.envs import ENVIRONMENTS
        from jepax.io.config_yaml import suggest

        if self.environment not in ENVIRONMENTS:
            raise UserError(f"unknown environment {self.environment!r}; {suggest(self.environment, ENVIRONMENTS)}")
        config = collect.CollectConfig(self.policy, self.num_episodes, self.image_size, self.max_steps, self.seed)
        collect.collect(self.environment, self.out or Path("episodes") / self.environment, config)
