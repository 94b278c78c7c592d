"""The table of synonyms names fields that exist, and an error suggests a field only if it is clear which."""

import pytest

from jepax.commands import COMMANDS
from jepax.commands.synonyms import ANSWERS, SYNONYMS, closest_field, way_out
from jepax.io import config_yaml as configs
from jepax.recipes import RECIPES

FIELDS = ["seed", "optim.peak_lr", "optim.eps", "net.width", "net.depth", "head.width", "head.depth", "train.epochs"]
CONFIGS = {path for recipe in RECIPES.values() for path in configs.flatten(recipe())}
OPTIONS = {option for command in COMMANDS.values() for option in command.options()}


@pytest.mark.skipif("method.encoder.num_heads" not in CONFIGS, reason="old field names")
def test_every_target_is_a_field_of_a_recipe_or_an_option():
    assert not [
        target
        for row in SYNONYMS
        for target in row.split()
        if not any(f".{path}".endswith(f".{target}") for path in CONFIGS | OPTIONS)
    ]


def test_no_spelling_is_in_a_row_twice_and_none_is_answered_otherwise():
    for target, spellings in SYNONYMS.items():
        assert len(set(spellings.split())) == len(spellings.split()), target
        assert not set(spellings.split()) & set(ANSWERS), target


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lr", "optim.peak_lr"),
        ("optim.lr", "optim.peak_lr"),
        ("LR", "optim.peak_lr"),
        ("optimizer.learning_rate", "optim.peak_lr"),
        ("optim.peek_lr", "optim.peak_lr"),
        ("epochs", "train.epochs"),
        ("head.depth", "head.depth"),
        ("method.head.depth", "head.depth"),
        ("width", None),  # two fields
        ("optim.lambda", None),  # not in these fields
        ("optim.widths", None),  # not in this group
        ("heed.depth", "head.depth"),
        ("xyzzy", None),
    ],
)
def test_a_name_means_one_field_or_none(name, field):
    assert closest_field(name, FIELDS) == field


def test_the_end_of_an_error():
    assert way_out("lr", FIELDS) == "did you mean --optim.peak-lr?"
    assert way_out("width", FIELDS) == "did you mean one of --net.width, --head.width?"
    assert way_out("optim.nesterov", FIELDS) == "optim has peak_lr, eps"
    assert way_out("output_dir", FIELDS, ["run_dir"]) == "did you mean --run-dir?"
    assert way_out("xyzzy", FIELDS) == "--help after the recipe lists every field"
    assert way_out("resume", FIELDS) == "the same command again resumes its run"
