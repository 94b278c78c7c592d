"""The commands of `jepax`: one command, one file.

These files import only tyro at the top, so that `--help` does not wait for jax; `run` imports what it needs.
"""

from jepax.commands.base import Command
from jepax.commands.bench import Bench, BenchData
from jepax.commands.collect import Collect
from jepax.commands.doctor import Doctor
from jepax.commands.evaluate import Evaluate
from jepax.commands.export import Export
from jepax.commands.pack import Pack
from jepax.commands.recipes import Recipes
from jepax.commands.replay import Replay
from jepax.commands.sweep import Sweep
from jepax.commands.train import Train

COMMANDS: dict[str, type[Command]] = {
    "recipes": Recipes,
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
    "sweep": Sweep,
    "doctor": Doctor,
    "replay": Replay,
    "bench": Bench,
    "bench-data": BenchData,
    "pack": Pack,
    "collect": Collect,
}

__all__ = ["COMMANDS", "Command"]
