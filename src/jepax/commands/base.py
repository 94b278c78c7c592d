"""A command is a frozen dataclass: its docstring and fields are its `--help`, and `run` does the work."""

import abc
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from jepax.commands.parsing import Flags, leaves, parse, print_help, split_words, to_field_path
from jepax.commands.synonyms import closest_field, to_flag
from jepax.errors import UserError

if TYPE_CHECKING:  # jax takes seconds to import
    from jepax.training.config import Config

C = TypeVar("C", bound="Command")
OPTIONS = (tyro.conf.AvoidSubcommands, tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff)


@dataclass(frozen=True)
class Command(abc.ABC):
    """A command. Fields without a default are its arguments, the others its options; the docstring ends in an
    example."""

    @abc.abstractmethod
    def run(self) -> None:
        """Do it."""

    def config_fields(self) -> dict[str, tuple[Any, object]]:
        """More fields for `--help`, type and default by name: those of the config that the arguments name."""
        return {}

    @classmethod
    def arguments(cls) -> list[str]:
        """Names of the arguments."""
        return [each.name for each in fields(cls) if each.default is MISSING]

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Types of the options by name."""
        return {name: kind for name, kind in leaves(cls).items() if name not in [*cls.arguments(), "overrides"]}

    @classmethod
    def read(cls: type[C], name: str, words: Sequence[str]) -> C | None:
        """The command with these words; None if they ask for help, which is then printed.

        Raises `UserError` naming the argument or the option, its value and the way out.
        """
        options, needed, prog = cls.options(), cls.arguments(), f"jepax {name}"
        given, groups = split_words(words, switches=[option for option, kind in options.items() if kind is bool])
        if {"-h", "--help"} & set(words):
            given = [word for word in given if not word.startswith("-")]
            extra = cls(*given).config_fields() if len(given) == len(needed) > 0 else {}
            print_help(cls, prog, OPTIONS, extra)
            return None
        if len(given) != len(needed) or any(word.startswith("-") for word in given):
            takes, got = " ".join(needed).upper() or "no arguments", " ".join(map(repr, given)) or "none"
            example = (cls.__doc__ or "").strip().splitlines()[-1].strip()
            raise UserError(f"{prog} takes {takes}, then --OPTION VALUE ..., but got {got}\n{example}")
        own = [group for group in groups if to_field_path(group[0]) in options]
        names = [to_field_path(flag) for flag, *_ in own]
        if len(set(names)) < len(names):
            raise UserError(f"duplicate option {to_flag(max(names, key=names.count))}; give it once")
        others = [group for group in groups if group not in own]
        if others and not issubclass(cls, ConfigCommand):
            near = closest_field(to_field_path(flag := others[0][0]), list(options))
            known = f"{prog} takes {', '.join(map(to_flag, options)) or 'no options'}"
            raise UserError(f"unknown option {flag}; {f'did you mean {to_flag(near)}?' if near else known}")
        command = parse(cls, own, options=OPTIONS, arguments=given)
        return replace(command, overrides=others) if issubclass(cls, ConfigCommand) else command


@dataclass(frozen=True)
class ConfigCommand(Command):
    """A command whose other flags override fields of a config: --optim.peak-lr 3e-4."""

    overrides: Annotated[Flags, tyro.conf.Suppress] = field(default=(), kw_only=True)
    """Flags that are not the command's own."""

    def override(self, base: "Config") -> "Config":
        """The config with the fields that the command line names."""
        from jepax.commands.overrides import override

        return override(base, self.overrides, also=list(self.options()))


@dataclass(frozen=True)
class RecipeCommand(ConfigCommand):
    """A command on the config of a recipe or of a file."""

    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")]
    """A recipe, or a config file such as runs/NAME/config.yaml."""

    def config_fields(self) -> dict[str, tuple[Any, object]]:
        from jepax.commands.overrides import load_base
        from jepax.training.config import Config

        # A config's boolean fields take a value; a command's own do not.
        return {
            "config": (Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff], load_base(self.recipe))
        }

    def config(self) -> "Config":
        """The recipe's config with the fields that the command line names."""
        from jepax.commands.overrides import load_base

        return self.override(load_base(self.recipe))
