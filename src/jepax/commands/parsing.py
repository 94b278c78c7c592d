"""From the words of a command line to a dataclass, by tyro. Errors take one to five plain lines."""

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any, TypeVar, get_type_hints

import tyro

from jepax.commands.synonyms import way_out
from jepax.errors import UserError
from jepax.io.config_yaml import type_name

T = TypeVar("T")
Flags = Sequence[Sequence[str]]
"""Each flag with its values: [["--seeds", "0", "1"], ["--optim.peak-lr", "3e-4"]]."""


def split_words(words: Sequence[str], switches: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """`x --a 1 2 --b=3` as ["x"] and [["--a", "1", "2"], ["--b", "3"]]. `switches`: flags that take no value.

    A leading ~ in any word becomes the home folder: a shell does not expand that of --run-dir=~/runs.
    """
    arguments: list[str] = []
    groups: list[list[str]] = []
    for word in words:
        parts = list(map(os.path.expanduser, word.split("=", 1) if word.startswith("--") else [word]))
        if word.startswith("--"):
            groups.append(parts)
        elif groups and to_field_path(groups[-1][0]) not in switches:
            groups[-1] += parts
        else:
            arguments += parts
    return arguments, groups


def to_field_path(flag: str) -> str:
    """`--optim.peak-lr` as `optim.peak_lr`."""
    return flag.removeprefix("--").replace("-", "_")


def leaves(config: object, path: str = "") -> dict[str, Any]:
    """The type of every field by its dotted path. `config`: a dataclass, or its class if no field is a dataclass."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config if isinstance(config, type) else type(config))
    for each in fields(config):  # pyrefly: ignore[bad-argument-type]
        value = getattr(config, each.name, None)
        if is_dataclass(value):
            found |= leaves(value, f"{path}{each.name}.")
        else:
            found[f"{path}{each.name}"] = hints[each.name]
    return found


def parse(
    kind: type[T],
    groups: Flags,
    *,
    options: Sequence[Any],
    arguments: Sequence[str] = (),
    default: T | None = None,
    also: Sequence[str] = (),
) -> T:
    """`kind`, or `default`, with the fields that the flags name: all set together, since one may need another.

    `also`: names that an error may suggest, too. Raises `UserError` naming the field, its value and the way out.
    """
    kinds = leaves(kind if default is None else default)
    for flag, *_ in groups:
        if to_field_path(flag) not in kinds:
            raise UserError(f"unknown field {flag}; {way_out(to_field_path(flag), list(kinds), also)}")

    def attempt(some: Flags) -> tuple[Any, BaseException | None]:
        words = [*arguments, *(word for group in some for word in group)]
        given = {} if default is None else {"default": default}
        # tyro would print boxes, not all of which `console_outputs=False` suppresses; our errors are plain lines.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                return tyro.cli(kind, args=words, config=options, **given), None
            except (SystemExit, ValueError) as error:
                return None, error

    value, error = attempt(groups)
    if error is None:
        return value
    if (cause := _user_error(error)) is not None:
        raise UserError(_with_path(str(cause), [to_field_path(flag) for flag, *_ in groups])) from cause
    for flag, *values in groups:
        failed = attempt([[flag, *values]])[1]
        if failed is not None and _user_error(failed) is None:
            problem = f"{' '.join(values)} is invalid" if values else "a value is missing"
            raise UserError(f"{flag}: {problem}: expected {type_name(kinds[to_field_path(flag)])}")
    raise UserError(f"these fields do not fit together: {' '.join(' '.join(group) for group in groups)}")


def print_help(kind: type, prog: str, options: Sequence[Any], extra: dict[str, tuple[Any, object]]) -> None:
    """Print every option of `kind`, and of the `extra` fields, with type, default and meaning."""
    if extra:
        more = [(name, hint, field(default=value, kw_only=True)) for name, (hint, value) in extra.items()]
        docs, kind = kind.__doc__, make_dataclass(kind.__name__, more, bases=(kind,), frozen=True)
        kind.__doc__ = docs
    with contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, config=options)


def _user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` that led to the error, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _with_path(message: str, paths: Sequence[str]) -> str:
    """The message, with the full path of the field if it begins with the end of one."""
    first = re.match(r"([\w.]+)=", message)
    named = [path for path in paths if first and f".{path}".endswith(f".{first[1]}")]
    return f"--{named[0].replace('_', '-')}: {message}" if named else message
