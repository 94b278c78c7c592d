"""From the words of a command line to its values."""

from pathlib import Path

import pytest

from jepax.commands import COMMANDS
from jepax.commands.parsing import split_words


def test_a_flag_ends_at_its_values_and_a_switch_has_none():
    words = ["x", "--a", "1", "2", "--b=3=4", "--on", "y"]
    assert split_words(words, ["on"]) == (["x", "y"], [["--a", "1", "2"], ["--b", "3=4"], ["--on"]])


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("train ijepa_fashion_mnist --run-dir=~/x", "run_dir"),
        ("train ijepa_fashion_mnist --run-dir ~/x", "run_dir"),
        ("train ~/x", "recipe"),
        ("evaluate ~/x", "run_folder"),
        ("evaluate runs/a --run-dir=~/x", "run_dir"),
        ("export ~/x out", "run_folder"),
        ("export runs/a ~/x", "folder"),
        ("sweep family_fashion_mnist --run-dir=~/x", "run_dir"),
        ("doctor ~/x", "folder"),
        ("replay ~/x", "dump"),
        ("bench ijepa_fashion_mnist --json=~/x", "json"),
        ("pack ~/x pack", "src"),
        ("pack photos ~/x", "dst"),
    ],
)
def test_every_path_of_a_command_may_begin_with_the_home_folder(words, field, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    name, *rest = words.split()
    assert Path(getattr(COMMANDS[name].read(name, rest), field)) == Path("/home/someone/x")


def test_so_may_a_path_of_the_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    command = COMMANDS["train"].read("train", ["ijepa_fashion_mnist", "--data.root=~/photos"])
    assert command.config().data.root == "/home/someone/photos"
