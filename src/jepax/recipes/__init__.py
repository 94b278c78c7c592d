"""Named experiments. A recipe is a function that returns a `Config`; its docstring gives source, command and score.

Importing this package registers the recipes of every file in it.
"""

import importlib
import pkgutil

from jepax.recipes.registry import RECIPES, recipe

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["RECIPES", "recipe"]
