"""A recipe or a config file, and what the command line overrides in it."""

from collections.abc import Sequence
from pathlib import Path

import tyro

from jepax.commands.parsing import Flags, leaves, parse
from jepax.commands.synonyms import way_out
from jepax.errors import UserError
from jepax.io import config_yaml as configs
from jepax.recipes import RECIPES
from jepax.training.config import Config

OPTIONS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)


def load_base(name: str) -> Config:
    """The recipe of that name, or the config in that file."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        again = f"jepax train {path / 'config.yaml'} --run-dir runs/NEW"
        raise UserError(f"{name} is a folder; to train its run again: {again}")
    if path.suffix in (".yaml", ".yml") or path.exists():
        return configs.load(Config, path)
    raise UserError(f"{name!r} is neither a recipe nor a config file; {configs.suggest(name, RECIPES)}")


def override(base: Config, groups: Flags, also: Sequence[str] = ()) -> Config:
    """The config with the fields that the flags name, checked as strictly as a config file."""
    if not groups:
        return base
    config = parse(Config, groups, options=OPTIONS, default=base, also=also)
    return configs.from_dict(Config, configs.to_dict(config), "command line")


def check_names(option: str, names: Sequence[str], config: Config) -> None:
    """Raise `UserError` at a name that is neither a field nor a group of fields."""
    paths = list(leaves(config))
    groups = {path.rsplit(".", parts)[0] for path in paths for parts in range(1, path.count(".") + 1)}
    for name in names:
        if name not in groups.union(paths):
            raise UserError(f"{option} {name}: no field or group of fields has this name; {way_out(name, paths)}")
