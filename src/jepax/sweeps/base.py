"""What a grid is: recipes with overrides, each run with every seed."""

from collections.abc import Callable
from dataclasses import dataclass

from jepax.types import UserError


def check_name(kind: str, name: str) -> None:
    """Raises `UserError` where the name is no plain name of a folder."""
    if not name.strip(".") or not all(c.isalnum() or c in "_-+." for c in name):
        raise UserError(f"{kind} name={name!r} is not a plain folder name: letters, digits, _ - + and . only")


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    """Names the row's folders too: letters, digits, `_`, `-`, `+` and `.`."""
    recipe: str
    """Recipe, or path of a config file."""
    overrides: tuple[str, ...] = ()
    """What the row varies, as on the command line: ("--optim.grad-clip-norm", "1.0")."""

    def __post_init__(self) -> None:
        check_name("row", self.name)


@dataclass(frozen=True)
class Sweep:
    """Rows that differ in what is compared and in nothing else."""

    name: str
    """Names the grid's folder."""
    about: str
    """One line above the table: what is compared, and what is held equal."""
    rows: tuple[Variant, ...]
    """In the table's order."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every row is run with each."""
    shared: tuple[str, ...] = ()
    """Overrides of every row; those of the command line come after them. None may be one that a row varies."""

    def __post_init__(self) -> None:
        check_name("grid", self.name)
        names = [row.name for row in self.rows]
        if not names or not self.seeds:
            raise UserError(f"grid {self.name}: rows={names} and seeds={list(self.seeds)} must not be empty")
        if len(set(names)) < len(names) or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"grid {self.name}: rows={names} or seeds={list(self.seeds)} hold one twice")
        if min(self.seeds) < 0:
            raise UserError(f"grid {self.name}: seeds={list(self.seeds)} must not be negative")


SWEEPS: dict[str, Callable[[], Sweep]] = {}


def sweep(function: Callable[[], Sweep]) -> Callable[[], Sweep]:
    """Enrols a function that returns a `Grid` whose `name` is the function's."""
    SWEEPS[function.__name__] = function
    return function
