"""Configs to YAML and back: everything survives, nothing is guessed."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from jepax.io import config_yaml as configs
from jepax.recipes import RECIPES
from jepax.training.config import Config
from jepax.types import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    sides: tuple[int, int] = (2, 3)
    rates: tuple[float, ...] = (0.1,)
    kind: Literal["one", "two", 3] = "one"
    clip: float | None = None
    name: str = "a"
    on: bool = False


@dataclass(frozen=True)
class Shape:
    registry: ClassVar[dict[str, type]] = {}
    name: ClassVar[str]


@dataclass(frozen=True)
class Round(Shape):
    name: ClassVar[str] = "round"
    radius: float = 1.0


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = field(default_factory=Inner)
    shape: Shape = field(default_factory=Round)


Shape.registry["round"] = Round


def read(**values):
    return configs.from_dict(Outer, {"count": 1, **values}, "here")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_file(name, tmp_path):
    config, path = RECIPES[name](), tmp_path / "config.yaml"
    configs.save(config, path)
    assert configs.load(Config, path) == config
    assert configs.diff(configs.load(Config, path), config) == []
    assert f"name: {config.method.name}" in path.read_text()


def test_defaults_may_be_left_out_and_numbers_written_as_people_do(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("count: 7\ninner: {rate: 3e-4, rates: [1, 2e-2], clip: 1, kind: 3}\n")
    loaded = configs.load(Outer, path)
    assert loaded == Outer(7, Inner(rate=3e-4, rates=(1.0, 0.02), clip=1.0, kind=3))
    assert isinstance(loaded.inner.clip, float) and isinstance(loaded.inner.rates[0], float)


@pytest.mark.parametrize("word", ["off", "on", "yes", "No"])
def test_words_that_yaml_1_1_reads_as_booleans_are_text(word, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {grad_guard: {on_spike: off}}\ndata: {synthetic_variable_size: true}\n")
    assert configs.load(Config, path).train.grad_guard.on_spike == "off"
    assert configs.load(Config, path).data.synthetic_variable_size is True
    path.write_text(f"data: {{synthetic_variable_size: {word}}}\n")
    with pytest.raises(UserError, match=f"synthetic_variable_size='{word}' is invalid: expected bool: True or False"):
        configs.load(Config, path)


def test_a_registered_class_is_built_by_its_name():
    assert read(shape={"name": "round", "radius": 2}).shape == Round(2.0)
    assert configs.to_dict(Outer(1))["shape"] == {"name": "round", "radius": 1.0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"iner": {}}, ["here", "unknown field iner", "did you mean inner?"]),
        ({"inner": {"rat": 1.0}}, ["unknown field inner.rat;", "inner.rate"]),
        ({"inner": {"rate": "fast"}}, ["inner.rate='fast'", "float"]),
        ({"inner": {"rate": True}}, ["inner.rate=True", "float"]),
        ({"inner": {"rate": float("nan")}}, ["inner.rate=nan", "not a number"]),
        ({"inner": {"sides": [1, 2, 3]}}, ["inner.sides=[1, 2, 3]", "2 values: int, int"]),
        ({"inner": {"sides": [1, 2.5]}}, ["inner.sides[1]=2.5", "int"]),
        ({"inner": {"rates": 0.1}}, ["inner.rates=0.1", "a list of float"]),
        ({"inner": {"kind": "three"}}, ["inner.kind='three'", "one of one, two, 3"]),
        ({"inner": {"clip": "no"}}, ["inner.clip='no'", "float or None"]),
        ({"inner": {"name": 5}}, ["inner.name=5", "str"]),
        ({"inner": {"on": "yes"}}, ["inner.on='yes'", "True or False"]),
        ({"inner": 3}, ["inner=3", "group of fields"]),
        ({"count": 1.0}, ["count=1.0", "int"]),
        ({"count": True}, ["count=True", "int"]),
        ({"shape": {"radius": 1.0}}, ["shape.name is missing", "round"]),
        ({"shape": {"name": "rond"}}, ["shape.name='rond'", "did you mean round?"]),
    ],
)
def test_what_is_wrong_is_named(values, words):
    with pytest.raises(UserError) as caught:
        read(**values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "No such file"]),
        ("a: [1", ["not plain YAML"]),
        ("inner: {}\n", ["count is missing"]),
        ("", ["the content=None"]),
        ("count: 1\ninner:\n  rate: 1.0\n  rate: 2.0\n", ["line 4", "duplicate key rate"]),
        ("count: !!python/object/apply:os.getcwd []\n", ["not plain YAML"]),
    ],
)
def test_a_bad_file_is_refused_by_name(content, words, tmp_path):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        configs.load(Outer, path)
    assert str(path) in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_a_class_keeps_its_own_checks():
    values = configs.to_dict(Config())
    values["optim"]["peak_lr"] = -1.0
    with pytest.raises(UserError, match=r"optim\.peak_lr=-1\.0 must be above 0"):
        configs.from_dict(Config, values, "here")
    values = configs.to_dict(Config())
    values["method"]["encoder"]["num_heads"] = 5
    with pytest.raises(UserError, match=r"^here: method\.encoder: num_heads=5 does not divide"):
        configs.from_dict(Config, values, "here")


def test_differences_are_told_by_field():
    assert configs.diff(Outer(1), Outer(2, Inner(clip=1.0))) == ["count: 1 -> 2", "inner.clip: None -> 1.0"]
