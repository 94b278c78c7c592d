"""`jepax evaluate`: any checkpoint of any run, any exported weights, any data, by any protocol."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from jepax import cli
from jepax.commands.evaluate import Evaluate
from jepax.commands.train import finalize, reason_not_to_evaluate
from jepax.data import DataConfig, open_source
from jepax.evals import report
from jepax.export import weights
from jepax.flops import tree_bytes
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig
from jepax.training import config as train_config
from jepax.training import evaluation, monitor, setup
from jepax.training import loop as training
from jepax.training.setup import init_method
from jepax.types import UserError
from tests.contracts.shrink import shrunk

QUICK = "--eval.batch-size 40 --eval.linear.epochs 2 --eval.linear.learning-rates 1e-2 --eval.linear.weight-decays 0"
KNN = "--protocols knn --eval.knn.k 3 --eval.knn.temperatures 0.1".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    config = shrunk("ijepa_fashion_mnist")
    config = replace(config, eval=replace(config.eval, linear=replace(config.eval.linear, epochs=2)))
    return run, config, training.train(config, run)


def told(capsys, *words):
    cli.main(["evaluate", *map(str, words)])
    out = capsys.readouterr().out
    return json.loads(Path(out.strip().splitlines()[-1]).read_text()), out


def test_the_runs_own_evaluation(finished, capsys):
    run, _, _ = finished
    found, out = told(capsys, run)
    assert out.strip().endswith("evals/step_00000006.json")
    assert set(found["rows"]) == {"trained", "untrained", "pixels", "majority"}
    assert found["step"] == 6 and found["data"]["dataset"] == "synthetic"
    for word in ("trained encoder", "linear: last, expanded", "95% interval"):
        assert word in out


def test_another_step_encoder_and_data_by_another_protocol(finished, capsys, tmp_path):
    run, _, _ = finished
    words = [
        *KNN,
        "--step",
        4,
        "--encoder",
        "context",
        "--pool",
        "sum",
        "--data.synthetic-seed",
        5,
        "--run-dir",
        tmp_path,
    ]
    found, out = told(capsys, run, *words)
    (written,) = (tmp_path / "evals").glob("*.json")
    assert written.name.startswith(f"{run.name}-step_00000004-knn-") and str(written) in out
    assert found["target"] == {"folder": run.name, "recipe": "ijepa_fashion_mnist", "encoder": "context"}
    assert found["step"] == 4 and found["data"]["synthetic_seed"] == 5
    assert "knn" in found["rows"]["trained"] and "linear" not in found["rows"]["trained"]
    again, _ = told(capsys, run, *words[:-4], "--data.synthetic-seed", 6, "--run-dir", tmp_path)
    assert len(list((tmp_path / "evals").glob("*.json"))) == 2 and again["rows"] != found["rows"]


def test_what_is_evaluated_is_what_the_checkpoint_holds(finished):
    run, config, state = finished
    subject = evaluation.target_from_run(config, evaluation.load_state(config, run), run)
    for ours, its in zip(
        jax.tree.leaves(subject.trained), jax.tree.leaves(state.method.target_encoder.average), strict=True
    ):
        np.testing.assert_array_equal(ours, its)
    first = init_method(config.method, 9, jr.key(config.seed)).target_encoder.average
    for ours, its in zip(jax.tree.leaves(subject.untrained), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(ours, its)


def test_the_optimisers_state_stays_on_the_disk(finished):
    run, config, state = finished
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    restored = evaluation.load_state(config, run)
    gc.collect()
    held = sum(x.nbytes for x in jax.live_arrays()) - before
    assert restored.opt_state is None or not jax.tree.leaves(restored.opt_state)
    assert held < 1.01 * tree_bytes(state.method) < tree_bytes(state)


def test_the_runs_own_training_pictures_are_not_needed(finished, tmp_path):
    run, config, _ = finished
    elsewhere = replace(config, data=replace(config.data, dataset="image_folder", root="/nowhere"))
    assert int(evaluation.load_state(elsewhere, run).step) == 6


def test_exported_weights_score_as_their_run_does(finished, capsys, tmp_path):
    run, config, state = finished
    weights.export(
        tmp_path / "out", state.method.target_encoder.average, config.method.crop, recipe="r", step=6, name="target"
    )
    pictures = (
        "--data.dataset synthetic --data.canvas-size 24 --data.channels 1 --data.synthetic-size 80"
        " --data.val-fraction 0.2"
    )
    found, out = told(capsys, tmp_path / "out", *pictures.split(), *KNN)
    assert "out/evals/weights-knn-" in out
    own, _ = told(capsys, run, *KNN)
    assert found["rows"]["trained"] == own["rows"]["trained"] and found["rows"]["pixels"] == own["rows"]["pixels"]


@pytest.mark.long
def test_every_protocol_runs(finished, capsys):
    run, _, _ = finished
    small = """--eval.linear-vissl.epochs 1 --eval.attentive.epochs 1 --eval.finetune.epochs 1
        --eval.low-shot.label-fractions 0.5 --eval.low-shot.shots 2 --eval.low-shot.num-draws 2"""
    protocols = list(evaluation.report.PROTOCOLS)
    found, out = told(capsys, run, "--protocols", *protocols, *QUICK.split(), *small.split())
    for row in ("trained", "untrained", "pixels"):
        for protocol in protocols:
            if (row, protocol) != ("pixels", "finetune"):
                assert 0 <= found["rows"][row][protocol]["top1"] <= 100
    assert "low shot: 2 per class" in out and "±" in out


@pytest.mark.long
def test_floors_are_measured_once(finished, capsys, tmp_path, monkeypatch):
    """Another step of the run, or the same evaluation after it was interrupted, takes them from where they lie."""
    run, _, _ = finished
    words = [*KNN, "--run-dir", tmp_path]
    first, _ = told(capsys, run, *words)
    measured, row = [], report.Evaluation.row
    monkeypatch.setattr(
        report.Evaluation, "row", lambda self, name, frozen: measured.append(name) or row(self, name, frozen)
    )
    other, _ = told(capsys, run, "--step", 4, *words)
    again, _ = told(capsys, run, *words)
    assert measured == ["trained", "trained"] and again == first
    assert other["rows"]["untrained"] == first["rows"]["untrained"] and other["step"] == 4


@pytest.mark.long
def test_a_run_may_end_without_an_evaluation(finished, capsys, tmp_path):
    run, config, state = finished
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evals"))
    config = replace(config, eval=replace(config.eval, protocols=()))
    finalize(config, state, tmp_path / "run", reason_not_to_evaluate(config, 4, tmp_path / "run"))
    out = capsys.readouterr().out
    assert f"not evaluated: eval.protocols is empty; jepax evaluate {tmp_path / 'run'}" in out and "curves.png" in out
    assert not (tmp_path / "run" / "evals").exists()


def test_images_of_one_class_have_no_score(finished, capsys, tmp_path):
    """A probe would be right by saying the only answer."""
    run, config, state = finished
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 256, (24, 24), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / "cat" / f"{number}.png")
    unlabeled = DataConfig("image_folder", str(tmp_path / "data"), canvas_size=24, channels=1, val_fraction=0.5)

    # Training goes on without scores, and names the way to some.
    assert train_config.can_evaluate_online(config, open_source(config.data, "train"))
    assert not train_config.can_evaluate_online(config, open_source(unlabeled, "train"))
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evals"))
    finalize(config, state, tmp_path / "run", reason_not_to_evaluate(config, 1, tmp_path / "run"))
    assert "not evaluated: all images are of one class" in capsys.readouterr().out

    # An evaluation that is asked for is refused.
    words = f"--data.dataset image_folder --data.root {tmp_path / 'data'} --data.val-fraction 0.5"
    test_errors_name_the_way_out(finished, capsys, words, ["one class", "--data.root FOLDER"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--protocols", ["--protocols linear knn"]),
        ("--step 5", ["no finished checkpoint of step 5", "4, 6"]),
        ("--step x", ["--step: x is invalid: expected int"]),
        ("--run-dir", ["--run-dir: a value is missing"]),
        ("--step 4 --step 6", ["duplicate option --step", "once"]),
        ("--encoder teacher", ["eval.encoder", "default, target, context"]),
        ("--protocols knn psychic", ["--eval.protocols", "psychic"]),
        ("--optim.peak-lr 1", ["an evaluation cannot change --optim.peak-lr", "--eval.FIELD.PATH"]),
        ("--data.dataset fashion_mnist --data.channels 3 --data.root /nowhere", ["data.root=/nowhere"]),
        ("--data.channels 3", ["reads 1 channels", "have 3", "--data.channels 1"]),
    ],
)
def test_errors_name_the_way_out(finished, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", str(finished[0]), *words.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and len(error.splitlines()) <= 5
    assert all(word in error for word in said), error


def test_online_evaluation_never_opens_the_test_split_and_changes_nothing_of_training(finished, tmp_path, monkeypatch):
    _, config, state = finished
    opened, real = [], train_config.open_source

    def noted(data, split):
        opened.append(split)
        return real(data, split)

    for module in (train_config, setup, monitor):
        monkeypatch.setattr(module, "open_source", noted)
    online = replace(config.eval.online, every_steps=2, train_images=20, validation_images=10)
    beside = training.train(replace(config, eval=replace(config.eval, online=online)), tmp_path)
    assert "train" in opened and "validation" in opened and "test" not in opened
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/probe_top1" in line] == [1, 3, 5]
    assert all(line["val/seconds"] > 0 for line in lines if "val/probe_top1" in line)
    for ours, its in zip(jax.tree.leaves(state), jax.tree.leaves(beside), strict=True):
        np.testing.assert_array_equal(ours, its)


def test_scores_come_at_the_next_line_of_the_log_and_a_resumed_run_has_them_too(finished, tmp_path, monkeypatch):
    """Every 2 steps, lines at steps 0, 1, 3 and 5: on both sides of a checkpoint at 3 steps."""
    _, config, _ = finished
    online = replace(config.eval.online, every_steps=2, train_images=20, validation_images=10)
    config = replace(
        config,
        eval=replace(config.eval, online=online),
        train=replace(config.train, log_every_steps=2, checkpoint=CheckpointConfig(every_steps=3, max_to_keep=9)),
    )
    training.train(config, tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"{step:08d}", ignore_errors=True)
    training.train(config, tmp_path)
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    scores = [
        [(line["step"], line.get("val/probe_top1")) for line in map(json.loads, lines)] for lines in (whole, again)
    ]
    assert scores[0] == scores[1]
    assert [step for step, score in scores[0] if score is not None] == [1, 3, 5]


def test_weights_hold_one_encoder(finished, tmp_path):
    _, config, state = finished
    weights.export(tmp_path / "out", state.method.encoder, config.method.crop, recipe="r", step=6, name="context")
    with pytest.raises(UserError, match="is for runs"):
        Evaluate.read("evaluate", [str(tmp_path / "out"), "--encoder", "context"]).target()


def test_a_folder_that_holds_no_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        Evaluate.read("evaluate", [str(tmp_path)]).target()


def test_settings_are_named_by_what_differs(finished):
    _, config, _ = finished
    same = replace(config, eval=replace(config.eval))
    assert evaluation.eval_tag(config, same) == ""
    assert evaluation.eval_tag(config, replace(config, seed=7)).startswith("-linear+knn-")
    other = replace(config, eval=replace(config.eval, pool="sum"))
    assert evaluation.eval_tag(config, other).startswith("-linear+knn-")
    assert evaluation.eval_tag(config, other) != evaluation.eval_tag(
        config, replace(other, data=replace(other.data, synthetic_seed=9))
    )
    assert configs.diff(config, same) == []
