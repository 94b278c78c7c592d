"""The whole evaluation on made pictures: rows, what may read the test split's labels, and the file that is written."""

import dataclasses
import json

import jax
import jax.random as jr
import numpy as np
import pytest
from rich.console import Console

from jepax.data.sources import ArraySource
from jepax.evals import report
from jepax.evals.feature_extractor import PixelFeatures, ViTFeatures
from jepax.evals.knn import KnnConfig
from jepax.evals.linear import LinearConfig
from jepax.evals.progress import Progress
from jepax.evals.protocols import PROTOCOLS, EvalConfig
from jepax.evals.report import Evaluation, aggregate_runs, controls_table, evaluate, results_table, write_report
from jepax.evals.scoring import FittedProbe
from jepax.nn import ViT, ViTConfig
from jepax.types import UserError
from jepax.views import CropConfig

CLASSES = 3
CROP = CropConfig(size=(8, 8), mean=(0.5,), std=(0.25,), eval_resize_ratio=1.0)
ENCODER = ViTConfig(patch_size=4, in_channels=1, width=16, depth=2, num_heads=2, init_std=None)
CONFIG = EvalConfig(
    batch_size=32,
    linear=LinearConfig(epochs=3, batch_size=32, learning_rates=(1e-2,), weight_decays=(0.0,)),
    knn=KnnConfig(k=(3,), temperatures=(0.1,), query_chunk=32),
)


def source(count, seed):
    """Class c is of the c-th brightness."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    canvas = rng.integers(0, 130, (count, 8, 8, 1)) + 40 * labels[:, None, None, None]
    return ArraySource((8, 8, 1), tuple("abc"), labels, canvas.astype(np.uint8))


@pytest.fixture(scope="module")
def sources():
    return {"train": source(150, 0), "validation": source(60, 1), "test": source(70, 2)}


@pytest.fixture(scope="module")
def rows():
    trained, untrained = (ViTFeatures(ViT(ENCODER, key=jr.key(seed)), CROP) for seed in (1, 0))
    return {"trained": trained, "untrained": untrained, "pixels": PixelFeatures(CROP, 4)}


@pytest.fixture(scope="module")
def evaluation(rows, sources):
    lines = []
    return evaluate(rows, sources, CONFIG, step=12, key=jr.key(0), progress=Progress(lines.append)), lines


def test_every_row_has_its_accuracies(evaluation):
    results, lines = evaluation
    assert list(results["rows"]) == ["trained", "untrained", "pixels", "majority"]
    assert results["rows"]["pixels"]["linear"]["top1"] > results["rows"]["majority"]["top1"] + 10
    assert results["protocol"]["examples"] == {"train": 150, "validation": 60, "test": 70}
    assert [line for line in lines if "warning" in line] == []
    for row in ("trained", "untrained", "pixels"):
        for protocol in ("linear", "knn"):
            found = results["rows"][row][protocol]
            assert found["ci95"][0] <= found["top1"] <= found["ci95"][1]
    assert set(results["rows"]["trained"]["linear"]["controls"]) > {"last", "last four, projected", "last, expanded"}
    assert results["rows"]["pixels"]["linear"]["controls"] == {}


def test_test_labels_change_no_choice_and_reach_no_protocol(rows, sources, evaluation):
    """Other labels of the test split: every setting that was tried and chosen stays, and only the scores change."""
    planted = dataclasses.replace(sources["test"], labels=np.roll(sources["test"].labels, 1))
    found = evaluate(rows, sources | {"test": planted}, CONFIG, step=12, key=jr.key(0))
    for row in rows:
        for protocol in CONFIG.protocols:
            honest, other = evaluation[0]["rows"][row][protocol], found["rows"][row][protocol]
            assert (honest["best"], honest["trials"]) == (other["best"], other["trials"])
            assert honest["top1"] != other["top1"]


def test_a_protocol_that_looks_for_the_test_labels_finds_none(rows, sources, monkeypatch):
    """A leak is planted: a protocol whose guesses are the labels that it was handed."""
    seen = []

    def leaky(data, config):
        def guess(split):
            seen.extend([split.labels, split.source.labels, split.features.labels])
            seen.extend(images.label[:valid] for images, valid in split.images())
            return split.labels[:, None]

        return [FittedProbe("leaky", guess, {})]

    monkeypatch.setitem(PROTOCOLS, "knn", leaky)
    config = dataclasses.replace(CONFIG, protocols=("knn",))
    found = evaluate({"trained": rows["trained"]}, sources, config, step=0, key=jr.key(0))
    assert found["rows"]["trained"]["knn"]["top1"] == 0.0
    assert seen and all((labels == -1).all() for labels in seen)


def test_test_pictures_planted_in_training_are_told(rows, sources):
    train = dataclasses.replace(
        sources["train"], images=np.concatenate([sources["train"].images[:140], sources["test"].images[:10]])
    )
    lines = []
    found = evaluate(
        {"trained": rows["trained"]},
        sources | {"train": train},
        CONFIG,
        step=0,
        key=jr.key(0),
        progress=Progress(lines.append),
    )
    assert found["rows"]["trained"]["duplicate_images"]["train/test"] == 10
    assert [line for line in lines if "warning" in line] == ["warning: 10 images of train and test are identical"]


def test_pixels_are_not_fine_tuned(rows, sources, monkeypatch):
    called = []

    def tuned(data, config):
        called.append(type(data.train.extractor).__name__)
        return [FittedProbe("finetune", lambda split: np.zeros((len(split), 1), np.int32), {})]

    monkeypatch.setitem(PROTOCOLS, "finetune", tuned)
    config = dataclasses.replace(CONFIG, protocols=("finetune",))
    found = evaluate(rows, sources, config, step=0, key=jr.key(0))
    assert called == ["ViTFeatures", "ViTFeatures"]
    assert "finetune" not in found["rows"]["pixels"]
    assert results_table(found).row_count == 4


def test_an_encoder_that_gives_one_vector_for_everything_is_evaluated_too(rows, sources, tmp_path):
    still = jax.tree.map(lambda leaf: leaf * 0, rows["trained"])
    found = evaluate({"trained": still}, sources, CONFIG, step=0, key=jr.key(0))
    assert found["rows"]["trained"]["effective_rank"] == 1.0
    assert found["rows"]["trained"]["health"]["feature/alpha_req"] is None
    assert json.loads(write_report(found, tmp_path, "still").read_text()) == found


def test_repeats_are_told_by_mean_and_deviation():
    runs = [{"top1": top1, "top5": 90.0, "ci95": (top1 - 3, top1 + 2)} for top1 in (60.0, 62.0, 67.0)]
    found = aggregate_runs(runs)
    assert found["top1"] == pytest.approx(63) and found["std"] == pytest.approx(np.std([60, 62, 67], ddof=1))
    assert found["ci95"] == pytest.approx([60, 65])
    assert found["runs"] == runs and aggregate_runs(runs[:1]) == runs[0]


def test_floors_are_kept_and_found_again(rows, sources, evaluation, tmp_path, monkeypatch):
    first = evaluate(rows, sources, CONFIG, step=12, key=jr.key(0), baseline_cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    measured = []
    row = report.Evaluation.row
    monkeypatch.setattr(
        report.Evaluation, "row", lambda self, name, frozen: measured.append(name) or row(self, name, frozen)
    )
    again = evaluate(rows, sources, CONFIG, step=12, key=jr.key(0), baseline_cache=tmp_path)
    assert measured == ["trained"] and again["rows"] == first["rows"] == evaluation[0]["rows"]
    other = dataclasses.replace(CONFIG, knn=KnnConfig(k=(5,), temperatures=(0.1,)))
    evaluate(rows, sources, other, step=12, key=jr.key(0), baseline_cache=tmp_path)
    assert measured == ["trained", "trained", "untrained", "pixels"]


def test_the_file_holds_exactly_the_results(evaluation, tmp_path):
    path = write_report(evaluation[0], tmp_path, "final")
    assert path == tmp_path / "evals" / "final.json"
    assert json.loads(path.read_text()) == evaluation[0]
    assert [entry.name for entry in path.parent.iterdir()] == ["final.json"]


def shown(*tables):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    with console.file:
        for each in tables:
            console.print(each)
    return console.export_text()


def test_the_tables_show_every_row_and_what_stands_beside(evaluation):
    results = evaluation[0]
    text = shown(results_table(results), controls_table(results))
    for name in ("trained encoder", "untrained encoder", "raw pixels", "majority class", "step 12"):
        assert name in text
    found = results["rows"]["trained"]
    low, high = found["knn"]["ci95"]
    assert f"{found['knn']['top1']:.2f} ({low:.1f}-{high:.1f})" in text
    assert found["linear"]["variant"] in text
    assert f"{found['linear']['controls']['last, expanded']['top1']:.2f}" in text


def majority(train, test, classes):
    def labeled(labels):
        labels = np.asarray(labels, np.int32)
        return ArraySource(
            (1, 1, 1), tuple(map(str, range(classes))), labels, np.zeros((len(labels), 1, 1, 1), np.uint8)
        )

    return Evaluation({"train": labeled(train), "test": labeled(test)}, CONFIG, jr.key(0)).majority()


def test_majority_is_chosen_on_train_and_read_on_test():
    result = majority(np.repeat(np.arange(7), [1, 9, 2, 8, 3, 7, 4]), [1, 1, 3, 0, 2, 4, 5, 6], 7)
    assert result["top1"] == 25.0
    assert result["top5"] == 100 * 6 / 8  # classes 1, 3, 5, 6, 4


def test_equally_frequent_classes_go_by_number():
    result = majority([2, 2, 1, 1, 0], [1, 1, 2], 3)
    assert result["top1"] == pytest.approx(100 * 2 / 3)
    assert result["top5"] == 100.0


def test_bad_labels_are_refused_before_anything_is_embedded(rows, sources):
    bad = dataclasses.replace(sources["test"], labels=np.full(70, 7, np.int32))
    with pytest.raises(UserError, match="labels of the test split"):
        evaluate(rows, sources | {"test": bad}, CONFIG, step=0, key=jr.key(0))


def test_names_that_are_paths_are_refused(evaluation, tmp_path):
    with pytest.raises(UserError, match="name"):
        write_report(evaluation[0], tmp_path, "../final")


@pytest.mark.parametrize("change", [{"protocols": ("knn", "knn")}, {"batch_size": 0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        EvalConfig(**change)
