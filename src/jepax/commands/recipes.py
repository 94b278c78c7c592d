"""`jepax recipes`: a list."""

from dataclasses import dataclass

from jepax.commands.base import Command


@dataclass(frozen=True)
class Recipes(Command):
    """List the recipes and the sweeps.

    For example: jepax recipes
    """

    def run(self) -> None:
        from jepax.recipes import RECIPES
        from jepax.sweeps import SWEEPS

        width = max(map(len, [*RECIPES, *SWEEPS]))
        for title, functions in (("", RECIPES), ("\nsweeps", SWEEPS)):
            if title:
                print(title)
            for name, function in sorted(functions.items()):
                print(f"{name:<{width}}  {(function.__doc__ or '').strip().splitlines()[0]}")
