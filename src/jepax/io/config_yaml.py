"""Converts frozen dataclasses to plain dicts and YAML files, and back, without guessing keys or types."""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from contextlib import suppress
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

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, True)


def to_dict(config: object) -> dict[str, Any]:
    """Convert to plain values. A class in a `registry`, such as a method's config, writes its `name` first."""
    named = {"name": type(config).name} if _registry(type(config)) is not None else {}
    return named | {field.name: _to_plain_value(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _to_plain_value(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_to_plain_value(inner) for inner in value] if isinstance(value, tuple) else value


def from_dict(cls: type[T], values: object, where: str, path: str = "") -> T:
    """Build a `cls` from plain values; fields with a default may be absent. For errors, `where` is the values' origin
    and `path` their place in it.

    Raises `UserError` at the first unknown key, missing field or wrong type, and what the classes themselves raise.
    """
    if not isinstance(values, dict):
        raise _invalid(path or "the content", values, cls, where)
    cls, values = _registered_class(cls, dict(values), path, where)
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


def _registered_class(cls: type, values: dict, path: str, where: str) -> tuple[type, dict]:
    """The class registered under the dict's `name`, and the other values; `cls` if it has no registry."""
    if (registry := _registry(cls)) is None:
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
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where, path)
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        if len(members) == 1 and isinstance(value, dict):  # the error of the only member names the key
            return convert(members[0], value, path, where)
        for member in arguments:
            with suppress(UserError):
                return convert(member, value, path, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(convert(kind, inner, f"{path}[{index}]", where) for index, (kind, inner) in pairs)
    elif _is_scalar(kind, value):
        return float(value) if kind is float else value
    raise _invalid(path, value, kind, where)


def _is_scalar(kind: Any, value: Any) -> bool:
    """True if the value is of this type; for `float`, if it is a finite number or the text of one."""
    if get_origin(kind) is Literal:
        return any(type(choice) is type(value) and choice == value for choice in get_args(kind))
    if kind is float and type(value) in (int, float, str):  # text: PyYAML reads 3e-4 as text
        with suppress(ValueError, OverflowError):
            return math.isfinite(float(value))
        return False
    if kind is int and type(value) is int:
        return abs(value) < 2**63  # no field needs more, and floats overflow
    return kind is Any or type(value) is kind


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
    """Every value of the config, or of nested dicts, by its dotted path."""
    values: dict[str, Any] = {}
    for name, value in to_dict(config).items() if dataclasses.is_dataclass(config) else config.items():
        inner = f"{path}.{name}" if path else name
        values |= flatten(value, inner) if isinstance(value, dict) else {inner: value}
    return values


def diff(old: object, new: object) -> list[str]:
    """Lines `field.path: old -> new`, in the config's order; empty if both are equal."""
    before, after = flatten(old), flatten(new)
    pairs = {path: (before.get(path, "(absent)"), after.get(path, "(absent)")) for path in before | after}
    return [f"{path}: {was} -> {now}" for path, (was, now) in pairs.items() if was != now]
