"""The examples, and the README's Python, run: on generated images, for a few steps, without network."""

import importlib.util
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from jepax.data import DataConfig, batches, open_source
from jepax.trees import global_norm
from jepax.views import CropConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source():
    """Generated gray images of 28 x 28 pixels, as Fashion-MNIST's."""
    return open_source(DataConfig(dataset="synthetic", canvas_size=28, channels=1), "train")


def load_example(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load_example("ijepa_from_scratch")


def distance(a, b):
    a, b = (eqx.filter(tree, eqx.is_inexact_array) for tree in (a, b))
    return float(global_norm(jax.tree.map(lambda x, y: x - y, a, b)))


@pytest.mark.long
def test_training_moves_both_encoders(example, source, capsys):
    start, method = example.METHOD.build(total_steps=3, key=jr.key(0)), example.train(source, 3)
    moved, followed = (
        distance(method.encoder, start.encoder),
        distance(method.target_encoder.average, start.target_encoder.average),
    )
    assert 0 < followed < moved < np.inf
    assert re.fullmatch(r"step 3 of 3: loss \d\.\d+\n", capsys.readouterr().out)


def test_the_table_has_both_baselines(example, capsys, monkeypatch):
    monkeypatch.setattr(example, "train", lambda source, steps: example.METHOD.build(total_steps=steps, key=jr.key(1)))
    scores = example.main(["--steps", "3", "--dataset", "synthetic"])
    assert list(scores) == ["trained encoder", "untrained encoder", "raw pixels"]
    assert all(0 <= score <= 100 for score in scores.values()) and len(set(scores.values())) > 1
    assert capsys.readouterr().out.count("\n") == 5


def test_knn_accuracy(example):
    features, labels = np.repeat(np.eye(2, 3), 30, axis=0) + 0.1, np.repeat([0, 1], 30)
    assert example.knn_accuracy((features, labels), (features, labels)) == 100
    assert example.knn_accuracy((features, labels), (features, 1 - labels)) == 0


def test_the_readmes_python_trains(source, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.setattr("jepax.data.open_source", lambda *_: source)
    names = {}
    exec(code.replace("1000", "2"), names)
    assert names["step"] == 1 and np.isfinite(names["value"])


def test_every_image_is_its_own_nearest_neighbor():
    module = load_example("nearest_neighbors")
    (batch,) = batches(
        open_source(DataConfig(dataset="synthetic", canvas_size=28), "train"), batch_size=12, steps=1, seed=0
    )
    queries, crop = jax.tree.map(lambda x: x[:3], batch), CropConfig(size=(28, 28))
    columns = module.neighbor_columns("pixels", lambda x: x.reshape(len(x), 1, -1), queries, batch, crop)
    assert [title for title, _ in columns] == ["pixels 1", "pixels 2", "pixels 3", "pixels 4"]
    np.testing.assert_array_equal(columns[0][1], module.pixels(queries, crop))
    assert len(module.draw(columns).axes) == 3 * 4
