"""Converts frozen dataclasses to plain dicts and YAML files, and back, without guessing keys or types."""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from jepax.errors import UserError
from jepax.io import atomic
from jepax.io.safe_load import printable, read_yaml

T = TypeVar("T")
SIMILAR = 0.7
"""Least similarity of two names, in [0, 1], at which one is suggested for the other."""


def load(cls: type[T], path: Path) -> T:
    """Read a YAML file strictly. Raises `UserError` if it is missing, not plain YAML, or not a `cls`."""
    return from_dict(cls, read_yaml(path), str(path))


def save(config: object, path: Path) -> None:
    """Write the YAML file atomically."""
    atomic.atomic_write(path, to_yaml(config))


def to_yaml(config: object) -> str:
    """The config as YAML."""
    return yaml.dump(to_dict(config), Dumper=_InlineListDumper, sort_keys=False, allow_unicode=True, width=110)


class _InlineListDumper(yaml.SafeDumper):
    """Writes lists on one line."""


_InlineListDumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)


def to_dict(config: object) -> dict[str, Any]:
    """Convert to plain values. A class in a `registry`, such as a method's config, writes its `name` first."""
    named = {"name": type(config).name} if _registry(type(config)) is not None else {}
    return named | {field.name: _to_plain_value(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _to_plain_value(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_to_plain_value(inner) for inner in value] if isinstance(value, tuple) else value


def from_dict(cls: type[T], values: object, where: str) -> T:
    """Build a `cls` from these values; fields with a default may be absent. `where`: the values' origin, for errors.

    Raises `UserError` at the first unknown key, missing field or wrong type, and what the classes themselves raise.
    """
    return _build(cls, values, "", where)


def _build(cls: type[T], values: object, path: str, where: str) -> T:
    if not isinstance(values, dict):
        raise _invalid(path or "the content", values, cls, where)
    cls, values = _subclass(cls, dict(values), path, where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    # Every key is a field, and every field without a default is present.
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown field {_join_path(path, key)}; {suggest(str(key), fields, path)}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {_join_path(path, name)} is missing, and has no default")
    # Every value has its field's type; then the class checks its own rules.
    kinds = get_type_hints(cls)
    converted = {name: convert(kinds[name], value, _join_path(path, name), where) for name, value in values.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise UserError(f"{where}: {path}: {error}" if path and path not in str(error) else str(error)) from error


def _subclass(cls: type, values: dict, path: str, where: str) -> tuple[type, dict]:
    """The class registered under the dict's `name`, and the other values."""
    registry = _registry(cls)
    if registry is None:
        return cls, values
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        problem = " is missing" if name is None else f"={printable(repr(name))} is unknown"
        raise UserError(f"{where}: {_join_path(path, 'name')}{problem}; {suggest(str(name), registry)}")
    if not issubclass(registry[name], cls):
        raise UserError(f"{where}: {_join_path(path, 'name')}={name!r} does not belong here; try {cls.name!r}")
    return registry[name], values


def _registry(cls: type) -> dict[str, type] | None:
    registry = getattr(cls, "registry", None)
    return registry if isinstance(registry, dict) else None


def convert(kind: Any, value: object, path: str, where: str) -> Any:
    """Convert `value` to the type `kind` of a field. Raises `UserError` naming path, value and the type expected."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = _convert_union(arguments, value, path, where)
    elif origin is Literal:
        found = [choice for choice in arguments if type(choice) is type(value) and choice == value]
    elif origin is tuple:
        found = _convert_tuple(arguments, value, path, where)
    else:
        found = _match_scalar(kind, value)
    if not found:
        raise _invalid(path, value, kind, where)
    return found[0]


# Each of these returns the value in a list, or an empty list if it has another type.


def _convert_union(members: tuple, value: object, path: str, where: str) -> list:
    if value is None and type(None) in members:
        return [None]
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1 and isinstance(value, dict):  # the member's own error is more precise: which key, which type
        return [convert(members[0], value, path, where)]
    for member in members:
        try:
            return [convert(member, value, path, where)]
        except UserError:
            continue
    return []


def _convert_tuple(arguments: tuple, value: object, path: str, where: str) -> list[tuple]:
    if not isinstance(value, (list, tuple)):
        return []
    kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(value):
        return []
    return [tuple(convert(k, v, f"{path}[{i}]", where) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))]


def _match_scalar(kind: Any, value: object) -> list:
    if kind is float and not isinstance(value, bool):
        try:  # from text too: PyYAML reads 3e-4 as text
            number = float(value) if isinstance(value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            return []
        return [number] if math.isfinite(number) else []
    if kind is int and type(value) is int and abs(value) >= 2**63:  # no field needs it, and floats overflow
        return []
    return [value] if kind is Any or type(value) is kind else []


def type_name(kind: Any) -> str:
    """A type in words: `one of none, dots, full`, `2 values: float, float`, `int or None`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (bool, type(None)):
        return "bool: True or False" if kind is bool else "None"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values: {', '.join(map(type_name, arguments))}"
    return "a group of fields" if dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind))


def suggest(name: str, valid: Iterable[str], path: str = "") -> str:
    """The end of an error about a misspelled name: the valid one that is most similar, or all of them."""
    valid = list(valid)
    if close := difflib.get_close_matches(name, valid, n=1, cutoff=SIMILAR):
        return f"did you mean {_join_path(path, close[0])}?"
    return f"expected {'' if len(valid) == 1 else 'one of '}{', '.join(valid)}"


def _join_path(path: str, name: object) -> str:
    return f"{path}.{printable(name)}" if path else printable(name)


def _invalid(path: str, value: object, kind: Any, where: str) -> UserError:
    problem = "is not a number" if value != value else "is invalid"
    return UserError(f"{where}: {path}={printable(repr(value))} {problem}: expected {type_name(kind)}")


def flatten(config: object, path: str = "") -> dict[str, Any]:
    """Every value of the config by its dotted path."""
    values: dict[str, Any] = {}
    for name, value in to_dict(config).items() if dataclasses.is_dataclass(config) else config.items():
        inner = _join_path(path, name)
        values |= flatten(value, inner) if isinstance(value, dict) else {inner: value}
    return values


def diff(old: object, new: object) -> list[str]:
    """Lines `field.path: old -> new`, in the config's order; empty if both are equal."""
    missing = "(absent)"
    before, after = flatten(old), flatten(new)
    pairs = {path: (before.get(path, missing), after.get(path, missing)) for path in before | after}
    return [f"{path}: {was} -> {now}" for path, (was, now) in pairs.items() if was != now]
