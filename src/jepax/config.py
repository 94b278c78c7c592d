"""Frozen dataclasses to plain dicts and YAML files, and back, strictly: no key and no type is ever guessed."""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from jepax import files
from jepax.types import UserError
from jepax.untrusted import read_yaml, shown

T = TypeVar("T")


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line."""


_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def to_dict(config: object) -> dict[str, Any]:
    """Plain values only. A class kept in a `registry` (such as a method's config) writes its `name` first."""
    named = {"name": type(config).name} if _registry(type(config)) is not None else {}
    return named | {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def from_dict(cls: type[T], values: object, where: str) -> T:
    """Builds `cls`; fields that have a default may be left out. `where` names the values' origin in errors.

    Raises `UserError` at the first unknown key, missing field or wrong type, and what the classes themselves raise.
    """
    return _build(cls, values, "", where)


def _registry(cls: type) -> dict[str, type] | None:
    registry = getattr(cls, "registry", None)
    return registry if isinstance(registry, dict) else None


def _build(cls: type[T], values: object, path: str, where: str) -> T:
    if not isinstance(values, dict):
        raise _wrong(path or "the whole", values, cls, where)
    cls, values = _named(cls, dict(values), path, where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: {_join(path, key)} is no field; {nearest(str(key), fields, path)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: {_join(path, name)} is missing, and it has no default")
    kinds = get_type_hints(cls)
    converted = {name: convert(kinds[name], value, _join(path, name), where) for name, value in values.items()}
    try:
        return cls(**converted)
    except UserError as error:
        raise UserError(f"{where}: {path}: {error}" if path and path not in str(error) else str(error)) from error


def _named(cls: type, values: dict, path: str, where: str) -> tuple[type, dict]:
    """The subclass that the dict's `name` asks for, and the other values."""
    registry = _registry(cls)
    if registry is None:
        return cls, values
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        said = " is missing" if name is None else f"={shown(repr(name))} is unknown"
        raise UserError(f"{where}: {_join(path, 'name')}{said}; {nearest(str(name), registry)}")
    if not issubclass(registry[name], cls):
        raise UserError(f"{where}: {_join(path, 'name')}={name!r} does not belong here; take {cls.name!r}")
    return registry[name], values


def convert(kind: Any, value: object, path: str, where: str) -> Any:
    """`value` as a field annotated `kind` holds it. Raises `UserError` naming path, value and the type wanted."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(kind, arguments, value, path, where)
    if origin is Literal:
        found = [choice for choice in arguments if type(choice) is type(value) and choice == value]
    elif origin is tuple:
        found = _tuple(arguments, value, path, where)
    else:
        found = _scalar(kind, value)
    if not found:
        raise _wrong(path, value, kind, where)
    return found[0]


def _union(kind: Any, members: tuple, value: object, path: str, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = [member for member in members if member is not type(None)]
    if len(members) == 1 and isinstance(value, dict):  # its own error says more: which key, which type
        return convert(members[0], value, path, where)
    for member in members:
        try:
            return convert(member, value, path, where)
        except UserError:
            continue
    raise _wrong(path, value, kind, where)


def _tuple(arguments: tuple, value: object, path: str, where: str) -> list[tuple]:
    if not isinstance(value, (list, tuple)):
        return []
    kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(value):
        return []
    return [tuple(convert(k, v, f"{path}[{i}]", where) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))]


def _scalar(kind: Any, value: object) -> list:
    """The value in a list, or an empty list where it is none of that kind."""
    if kind is float and not isinstance(value, bool):
        try:  # from text too: PyYAML reads 3e-4 as text
            number = float(value) if isinstance(value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            return []
        return [number] if math.isfinite(number) else []
    if kind is int and type(value) is int and abs(value) >= 2**63:  # no number of anything, and too large for a float
        return []
    return [value] if kind is Any or type(value) is kind else []


def describe(kind: Any) -> str:
    """A type in words: `one of none, dots, full`, `2 values: float, float`, `int or None`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (bool, type(None)):
        return "bool: True or False" if kind is bool else "None"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {describe(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values: {', '.join(map(describe, arguments))}"
    return "a group of fields" if dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind))


def nearest(name: str, valid: Iterable[str], path: str = "") -> str:
    """The way out of a misspelt name: the nearest valid one, or all of them."""
    valid = list(valid)
    if (close := closest(name, valid)) is not None:
        return f"did you mean {_join(path, close)}?"
    return f"there {'is' if len(valid) == 1 else 'are'} {', '.join(valid)}"


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is spelt most like it, if any is near."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return close[0] if close else None


def _join(path: str, name: object) -> str:
    return f"{path}.{shown(name)}" if path else shown(name)


def _wrong(path: str, value: object, kind: Any, where: str) -> UserError:
    wrong = "is not a number" if value != value else "has the wrong type"
    return UserError(f"{where}: {path}={shown(repr(value))} {wrong}; it wants {describe(kind)}")


def dump(config: object, path: Path) -> None:
    """Writes the YAML file, whole or not at all."""
    files.atomic_write(path, text(config))


def text(config: object) -> str:
    """The config as YAML."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def load(cls: type[T], path: Path) -> T:
    """Reads a YAML file strictly. Raises `UserError` where it is missing, no plain YAML, or no `cls`."""
    return from_dict(cls, read_yaml(path), str(path))


def flat(config: object, path: str = "") -> dict[str, Any]:
    """Every leaf of the config by its dotted path."""
    leaves: dict[str, Any] = {}
    for name, value in to_dict(config).items() if dataclasses.is_dataclass(config) else config.items():
        inner = flat(value, _join(path, name)) if isinstance(value, dict) else {_join(path, name): value}
        leaves |= inner
    return leaves


def differences(old: object, new: object) -> list[str]:
    """Lines `field.path: old -> new`, in the config's order; empty where both are equal."""
    before, after = flat(old), flat(new)
    paths = list(before) + [path for path in after if path not in before]
    return [
        f"{path}: {before.get(path, '(absent)')} -> {after.get(path, '(absent)')}"
        for path in paths
        if path not in before or path not in after or before[path] != after[path]
    ]
