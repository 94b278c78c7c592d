"""From the words after `jepax train` to a config: a recipe or a file, and what is overridden in it."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from jepax import config as configs
from jepax.recipes import RECIPES
from jepax.settings import Config
from jepax.types import UserError

OPTIONS = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
OWN = """--run-dir DIR   folder of the run (default: runs/{recipe}); the same command again continues it.
--resume.allow NAME ...   settings or groups in which the folder's run may go on otherwise than it began.
--distributed   one of several processes, on one host or many.
--dry-run       prints settings, sizes, arithmetic and memory, takes one step, and writes nothing."""


@dataclass(frozen=True)
class Wanted:
    """What `jepax train` was asked for."""

    config: Config
    run: Path
    dry: bool
    distributed: bool = False
    """Whether this is one of several processes."""
    allow: tuple[str, ...] = ()
    """Settings, or groups of them, in which a run may go on otherwise than it began."""


def resolve(arguments: list[str]) -> Wanted | None:
    """Reads the arguments of `jepax train`; None where they ask for help, which is then printed.

    Raises `UserError` naming the field, the value and the way out.
    """
    dry, distributed = "--dry-run" in arguments, "--distributed" in arguments
    if dry and distributed:
        raise UserError("--dry-run takes its step in one process; leave --distributed out")
    words = [word for word in arguments if word not in ("--dry-run", "--distributed")]
    if not words or words[0].startswith("-"):
        raise UserError(
            "give the recipe, or a config file, first: jepax train RECIPE --field.path value ...\n"
            f"recipes: {', '.join(sorted(RECIPES))}"
        )
    base = begin(words[0])
    if "--help" in words or "-h" in words:
        print_help(words[0], base)
        return None
    groups = grouped(words[1:])
    run = [group for group in groups if dotted(group[0]) == "run_dir"]
    if run and len(run[-1]) != 2:
        raise UserError("--run-dir takes one folder: --run-dir runs/NAME")
    allow = [group for group in groups if dotted(group[0]) == "resume.allow"]
    config = override(base, [group for group in groups if group not in [*run, *allow]])
    folder = Path(run[-1][1]) if run else Path("runs") / config.recipe
    insisted = allowed(config, [name for group in allow for name in group[1:]])
    return Wanted(config, folder, dry, distributed, insisted)


def allowed(config: Config, names: list[str]) -> tuple[str, ...]:
    """The names after `--resume.allow`. Raises `UserError` where one is neither a field nor a group of fields."""
    paths = [path for path, _ in leaves(config)]
    groups = {path.rsplit(".", parts)[0] for path in paths for parts in range(1, path.count(".") + 1)}
    names = [dotted(name) for name in names]
    for name in names:
        if name not in groups.union(paths):
            raise UserError(
                f"--resume.allow {name} is no field, nor a group of fields; {near_field(name, dict(leaves(config)))}"
            )
    return tuple(names)


def begin(name: str) -> Config:
    """The recipe of that name, or the config in that file."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        again = f"jepax train {path / 'config.yaml'} --run-dir runs/NEW"
        raise UserError(f"{name} is a folder; to train its run again: {again}")
    if path.suffix in (".yaml", ".yml") or path.exists():
        return configs.load(Config, path)
    raise UserError(f"{name!r} is neither a recipe nor a config file; {configs.nearest(name, RECIPES)}")


def print_help(name: str, base: Config) -> None:
    """Every field with its type, default and meaning."""
    about = f"{(RECIPES[name].__doc__ or '').strip()}\n\n" if name in RECIPES else ""
    with contextlib.suppress(SystemExit):
        tyro.cli(
            Config,
            default=base,
            args=["--help"],
            prog=f"jepax train {name}",
            config=OPTIONS,
            description=about + OWN.format(recipe=base.recipe),
        )


def grouped(words: list[str]) -> list[list[str]]:
    """`--a 1 2 --b=3` as [[--a, 1, 2], [--b, 3]]."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        elif groups:
            groups[-1].append(word)
        else:
            raise UserError(f"{word!r} belongs to no field: write --field.path {word}")
    return groups


def dotted(flag: str) -> str:
    """`--optim.peak-lr` as `optim.peak_lr`."""
    return flag.removeprefix("--").replace("-", "_")


def override(base: Config, groups: list[list[str]]) -> Config:
    """The config with the fields that the groups name, all set together, since one may need another."""
    kinds = dict(leaves(base))
    for flag, *_ in groups:
        if dotted(flag) not in kinds:
            raise UserError(f"{flag} is no field; {near_field(dotted(flag), kinds)}")
    config, error = parsed(base, groups)
    if error is None:
        return configs.from_dict(Config, configs.to_dict(config), "command line")
    if isinstance(said := cause(error), UserError):
        raise UserError(located(str(said), [dotted(flag) for flag, *_ in groups])) from said
    for flag, *values in groups:
        failed = parsed(base, [[flag, *values]])[1]
        if failed is not None and not isinstance(cause(failed), UserError):
            given = " ".join(values) or "nothing"
            raise UserError(f"{flag}: {given} has the wrong type; it wants {configs.describe(kinds[dotted(flag)])}")
    raise UserError(f"these fields do not go together: {' '.join(' '.join(group) for group in groups)}")


def located(message: str, paths: list[str]) -> str:
    """The message, behind the whole path of the field that it begins with, where that is its last name alone."""
    first = re.match(r"(\w+)=", message)
    named = [path for path in paths if first and path.rsplit(".", 1)[-1] == first[1]]
    return f"--{named[0]}: {message}" if named else message


def parsed(base: Config, groups: list[list[str]]) -> tuple[Any, BaseException | None]:
    """What tyro makes of the groups, or the error that ended it; its boxes are not shown."""
    words = [word for group in groups for word in group]
    return silenced(lambda: tyro.cli(Config, default=base, args=words, config=OPTIONS))


def silenced(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return call(), None
        except (SystemExit, ValueError) as error:
            return None, error


def cause(error: BaseException | None) -> BaseException | None:
    """The `UserError` that the error arose from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def leaves(config: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field's dotted path and type."""
    kinds = get_type_hints(type(config))
    for field in fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{name}.")
        else:
            yield name, kinds[field.name]


def near_field(name: str, valid: dict[str, Any]) -> str:
    """The nearest field: by its whole path, or by its last name where the path is left out."""
    last = [path for path in valid if path.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near = last[0] if last else configs.closest(name, [*valid, "run_dir", "dry_run"])
    if near is None:
        return "--help after the recipe lists every field"
    return f"did you mean --{near.replace('_', '-')}?"
