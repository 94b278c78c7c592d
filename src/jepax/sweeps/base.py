"""Defines a sweep: recipes with overrides, each run with every seed."""

from collections.abc import Callable
from dataclasses import dataclass

from jepax.types import UserError


def check_name(kind: str, name: str) -> None:
    """Raises `UserError` if the name is not a plain folder name."""
    if not name.strip(".") or not all(c.isalnum() or c in "_-+." for c in name):
        raise UserError(f"{kind} name={name!r} is not a plain folder name: letters, digits, _ - + and . only")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    """Name of the row and of its folders: letters, digits, `_`, `-`, `+` and `.`."""
    recipe: str
    """Recipe name, or path of a config file."""
    overrides: tuple[str, ...] = ()
    """Fields that the row varies, as on the command line: ("--optim.grad-clip-norm", "1.0")."""

    def __post_init__(self) -> None:
        check_name("row", self.name)


@dataclass(frozen=True)
class Sweep:
    """Rows that differ only in what is compared."""

    name: str
    """Name of the sweep and of its folder."""
    about: str
    """Text above the table: what is compared, and what is equal in all rows."""
    rows: tuple[Variant, ...]
    """Rows in the table's order."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every row."""
    shared: tuple[str, ...] = ()
    """Overrides of every row, before those of the command line. They must not set a field that a row varies."""

    def __post_init__(self) -> None:
        check_name("sweep", self.name)
        names, seeds = [row.name for row in self.rows], list(self.seeds)
        if not names or not seeds:
            raise UserError(f"sweep {self.name}: rows={names} and seeds={seeds} must not be empty")
        if len(set(names)) < len(names) or len(set(seeds)) < len(seeds):
            raise UserError(f"sweep {self.name}: rows={names} or seeds={seeds} contain one twice")
        if min(seeds) < 0:
            raise UserError(f"sweep {self.name}: seeds={seeds} must not be negative")


SWEEPS: dict[str, Callable[[], Sweep]] = {}


def sweep(function: Callable[[], Sweep]) -> Callable[[], Sweep]:
    """Registers a function that returns a `Sweep` of the function's name."""
    SWEEPS[function.__name__] = function
    return function
