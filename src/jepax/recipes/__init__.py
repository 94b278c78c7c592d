"""Named experiments. A recipe is a function that returns a `Config`; its docstring tells source, command and score.

Importing this package enrols the recipes of every file here.
"""

import importlib
import pkgutil

from jepax.recipes.registry import RECIPES, recipe

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["RECIPES", "recipe"]
