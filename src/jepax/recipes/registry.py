"""Registry of recipes, by function name."""

from collections.abc import Callable

from jepax.training.config import Config

RECIPES: dict[str, Callable[[], Config]] = {}


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Register a function that returns a `Config` whose `recipe` is the function's name."""
    RECIPES[function.__name__] = function
    return function
