"""Checks of a config's fields: what breaks a rule is named, with its value and the rule."""

from types import SimpleNamespace

import pytest

from jepax.errors import UserError, check_fields


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("above 0", (1e-9, 5, None), (0, -1.0, float("nan"))),
        ("at least 0", (0, 0.5), (-1e-9, float("nan"))),
        ("at least 1", (1, 7), (0, 0.5)),
        ("in [0, 1]", (0.0, 1.0), (-0.1, 1.1)),
        ("in [0, 1)", (0.0, 0.9), (1.0,)),
    ],
)
def test_the_first_field_that_breaks_the_rule_is_named(rule, good, bad):
    for value in good:
        check_fields("optim", SimpleNamespace(a=value), rule, "a")
    for value in bad:
        with pytest.raises(UserError) as caught:
            check_fields("optim", SimpleNamespace(a=good[0], b=value), rule, "a", "b")
        assert str(caught.value) == f"optim.b={value} must be {rule}"


def test_a_config_may_have_no_group():
    with pytest.raises(UserError, match=r"^depth=0 must be above 0$"):
        check_fields("", SimpleNamespace(depth=0), "above 0", "depth")
