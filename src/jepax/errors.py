"""The error that a user can fix, and its message. Imports nothing of jax, so that the command line starts at once."""

import os
import traceback
from collections.abc import Callable

CUDA_INSTALL = 'jax for NVIDIA GPUs: pip install ".[cuda13]"'


class UserError(ValueError):
    """Bad input from a user. The message takes one to five lines and names the field, the value and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


def user_message(error: BaseException) -> str | None:
    """The message for an error that a user can fix; None for all other errors."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return "the device ran out of memory; lower train.batch_size (see --dry-run), or a protocol's"
    if isinstance(error, (AssertionError, RuntimeError)) and "JAX_PLATFORMS" in os.environ and is_platform_error(error):
        chosen = os.environ["JAX_PLATFORMS"]
        return f"JAX_PLATFORMS={chosen}: jax finds no such device here; unset it, or install {CUDA_INSTALL}"
    return None


def is_platform_error(error: BaseException) -> bool:
    """True if jax raised the error while it looked for devices: a missing one is an `AssertionError` there."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith("xla_bridge.py")


RULES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def check_fields(group: str, config: object, rule: str, *names: str) -> None:
    """Raise `UserError` at the first of these fields that breaks the rule, one of `RULES`; None breaks none."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not RULES[rule](value):
            raise UserError(f"{group}.{name}={value} must be {rule}" if group else f"{name}={value} must be {rule}")
