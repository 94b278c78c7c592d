"""Registry of recipes, by function name, and how a recipe is made from another one."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from jepax.methods import MethodConfig
from jepax.training.config import Config

C = TypeVar("C", bound=Any)
RECIPES: dict[str, Callable[[], Config]] = {}


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Register a function that returns a `Config`, whose `recipe` becomes the function's name."""

    @functools.wraps(function)
    def named() -> Config:
        return replace(function(), recipe=function.__name__)

    RECIPES[function.__name__] = named
    return named


def override(config: C, changes: Mapping[str, Any]) -> C:
    """The config with other values at dotted paths: `override(config, {"method.encoder.depth": 4})`.

    Fields of one group change together, so that they are checked against each other.
    """
    # Direct fields of this config, and for each group of settings below it the fields that change there.
    values: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if rest:
            groups[name][rest] = value
        else:
            values[name] = value

    # Each group is replaced once, with all its changes; its `__post_init__` then checks them.
    parts = {name: override(getattr(config, name), part) for name, part in groups.items()}
    return replace(config, **values, **parts)


def with_method(config: Config, method: type[MethodConfig], **settings: Any) -> Config:
    """The experiment with another method: it keeps the fields that both methods have, except those in `settings`."""
    # `replace` cannot change the class, so the shared fields are copied by name.
    names = {field.name for field in fields(method)} & {field.name for field in fields(config.method)}
    shared = {name: getattr(config.method, name) for name in names}
    return replace(config, method=method(**shared | settings))
