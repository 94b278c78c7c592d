"""Checks of settings, labels and predictions. Their errors name the field or the split, the value and a fix."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jepax.types import AnyArray, Int, UserError

Check = Callable[[str, bool, str], None]
"""Arguments: a field's name, True if its value is valid, and the expected value in words."""


def field_check(prefix: str, config: Any) -> Check:
    """A check of the config's fields that **raises** `UserError` if a value is invalid."""

    def check(field: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise UserError(f"{prefix}.{field}={getattr(config, field)!r} is invalid: expected {expected}")

    return check


def check_training(protocol: str, config: Any) -> Check:
    """Checks the fields that training protocols share, and returns the check for the protocol's own fields."""
    check, rates, scale = field_check(protocol, config), config.learning_rates, config.crop_scale
    check("epochs", config.epochs >= 1, "at least 1 pass over the training split")
    check("batch_size", config.batch_size >= 1, "at least 1 example")
    check("learning_rates", len(rates) > 0 and min(rates) > 0, "at least one number, all above 0")
    check("crop_scale", len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "0 < low <= high <= 1; try (0.3, 1.0)")
    check("hflip_prob", 0 <= config.hflip_prob <= 1, "a probability in [0, 1]; try 0.5")
    return check


def check_labels(labels: Int[AnyArray, "n"], classes: int, split: str) -> None:
    """**Raises** `UserError` unless the split has examples and every label is in [0, classes)."""
    if len(labels) == 0:
        raise UserError(f"the {split} split has no examples; choose another split or source")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"labels of the {split} split run from {low} to {high}, outside [0, classes={classes}); set classes to the "
            "number of classes, and number them from 0"
        )


def check_predictions(predictions: Int[np.ndarray, "*heads n k"], protocol: str) -> None:
    """**Raises** `UserError` if no example has a prediction: an accuracy of that is meaningless."""
    if np.all(predictions < 0):
        raise UserError(
            f"{protocol}: no class has a finite value; the encoder has diverged, its input contains NaN,\n"
            f"or every one of {protocol}.learning_rates is too high. Look at the loss in metrics.jsonl."
        )
