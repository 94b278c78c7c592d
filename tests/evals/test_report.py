"""The whole evaluation on made images: rows, the number of passes over each split, and the file that is written."""

import json

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from rich.console import Console

from jepax.evals.floors import RawPixels
from jepax.evals.knn import KnnConfig
from jepax.evals.probe import ProbeConfig
from jepax.evals.report import EvalConfig, Splits, evaluate_all, table, write
from jepax.types import Images, UserError

CONFIG = EvalConfig(
    batch_size=32,
    probe=ProbeConfig(epochs=3, batch_size=32, learning_rates=(1e-2,), weight_decays=(0.0,)),
    knn=KnnConfig(neighbours=3, chunk=32),
)


def view(images):
    return jnp.asarray(images.canvas, jnp.float32) / 255


class Encoder(eqx.Module):
    """Two layers of random projections."""

    weight: jnp.ndarray

    def __call__(self, images):
        flat = view(images).reshape(len(images.canvas), -1)
        return jnp.einsum("bd,lde->lbe", flat, self.weight)


class Split:
    """A made split, and how often it was read: class c is brighter in row c."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.label = rng.integers(0, 3, count).astype(np.int32)
        self.canvas = rng.integers(0, 150, (count, 4, 4, 1)).astype(np.uint8)
        self.canvas[np.arange(count), self.label] += 60
        self.passes = 0

    def __call__(self):
        self.passes += 1
        for start in range(0, len(self.label), 32):
            index = np.arange(start, start + 32) % len(self.label)
            images = Images(
                self.canvas[index], np.full((32, 2), 4, np.int32), index.astype(np.int32), self.label[index]
            )
            yield images, min(32, len(self.label) - start)


@pytest.fixture(scope="module")
def evaluation():
    splits = Splits(Split(150, 0), Split(60, 1), Split(70, 2))
    encoders = [Encoder(jr.normal(jr.key(seed), (2, 16, 8))) for seed in (0, 1)]
    lines = []
    results = evaluate_all(*encoders, RawPixels(view), splits, 3, CONFIG, step=12, key=jr.key(0), say=lines.append)
    return results, splits, lines


def test_every_row_has_its_accuracies(evaluation):
    results, _, lines = evaluation
    assert list(results["rows"]) == ["trained", "untrained", "pixels", "majority"]
    assert results["rows"]["pixels"]["linear"]["top1"] > results["rows"]["majority"]["top1"] + 10
    assert results["protocol"]["examples"] == {"train": 150, "validation": 60, "test": 70}
    assert len(lines) == 9


def test_each_row_passes_over_the_test_split_once(evaluation):
    _, splits, _ = evaluation
    assert (splits.train.passes, splits.validation.passes, splits.test.passes) == (3, 3, 3)


def test_the_file_holds_exactly_the_results(evaluation, tmp_path):
    results, _, _ = evaluation
    path = write(results, tmp_path, "final")
    assert path == tmp_path / "evals" / "final.json"
    assert json.loads(path.read_text()) == results
    assert [entry.name for entry in path.parent.iterdir()] == ["final.json"]


def test_the_table_shows_every_row(evaluation):
    results, _, _ = evaluation
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(table(results))
    text = console.export_text()
    for name in ("trained encoder", "untrained encoder", "raw pixels", "majority class", "step 12"):
        assert name in text
    assert f"{results['rows']['trained']['knn']['top5']:.2f}" in text
    assert results["rows"]["trained"]["linear"]["variant"] in text


def test_the_untrained_row_can_be_left_out():
    splits = Splits(Split(150, 0), Split(60, 1), Split(70, 2))  # the shapes of `evaluation`, already compiled
    results = evaluate_all(
        Encoder(jr.normal(jr.key(0), (2, 16, 8))), None, RawPixels(view), splits, 3, CONFIG, step=0, key=jr.key(0)
    )
    assert "untrained" not in results["rows"]
    assert table(results).row_count == 3


def test_names_that_are_paths_are_refused(evaluation, tmp_path):
    with pytest.raises(UserError, match="name"):
        write(evaluation[0], tmp_path, "../final")
