"""Named experiments. A recipe is a function that returns a `Config`; its docstring tells source, command and score."""

from jepax.recipes import ijepa_fashion_mnist, ijepa_imagenet
from jepax.recipes.registry import RECIPES, recipe

__all__ = ["RECIPES", "ijepa_fashion_mnist", "ijepa_imagenet", "recipe"]
