"""Sweeps: each run once, resumed where it stopped, one table of what was measured."""

import csv
import dataclasses
import json
import shutil

import pytest

from jepax import cli
from jepax.commands.sweep import Sweep as SweepCommand
from jepax.commands.sweep import load_sweep
from jepax.evals import report
from jepax.evals.knn import KnnConfig
from jepax.io import config_yaml as configs
from jepax.sweeps import SWEEPS, Sweep, Variant, run, table
from jepax.training import evaluation
from jepax.types import UserError

TINY = """
    --data.dataset synthetic --data.canvas-size 28 --data.channels 1 --data.synthetic-size 80 --data.val-fraction 0.2
    --method.encoder.width 24 --method.encoder.depth 1 --train.batch-size 16 --train.steps 3 --optim.warmup-epochs 0.2
    --eval.batch-size 40 --eval.linear.epochs 2 --eval.linear.learning-rates 1e-2 --eval.linear.weight_decays 0.0
""".split()


def plan(*words):
    return SweepCommand.read("sweep", list(words)).plan()


@pytest.mark.parametrize("name", SWEEPS)
def test_every_row_of_a_built_in_sweep_is_a_run_and_no_two_are_the_same(name):
    sweep = SWEEPS[name]()
    assert sweep.name == name and sweep.about
    wanted = plan(name, "--seeds", "0", "1")
    assert len(wanted.jobs) == 2 * len(sweep.rows)
    assert len({job.folder for job in wanted.jobs}) == len({job.config for job in wanted.jobs}) == len(wanted.jobs)
    assert len({job.config.train for job in wanted.jobs}) == 1  # equal lengths and batches
    assert len({job.config.method.encoder for job in wanted.jobs}) == 1
    assert len({(job.config.data, job.config.eval) for job in wanted.jobs}) == 1
    if name == "family_fashion_mnist":
        assert len({job.config.optim for job in wanted.jobs}) == 1


def test_the_family_holds_every_cell():
    names = {row.name for row in SWEEPS["family_fashion_mnist"]().rows}
    cells = {f"{a}+{b}" for a in ("masked", "views") for b in ("ema", "sigreg", "rdmreg", "vicreg", "visreg")}
    assert cells <= names


def test_parts_share_out_the_runs(tmp_path):
    name, rows = str(tmp_path / "mine.yaml"), [Variant(row, "vicreg_fashion_mnist") for row in "abc"]
    configs.save(Sweep("mine", "", tuple(rows), seeds=(0, 1)), tmp_path / "mine.yaml")
    whole = plan(name).jobs
    parts = [plan(name, "--shard", f"{i}/3").jobs for i in (1, 2, 3)]
    assert [job.folder for job in parts[1]] == [job.folder for job in whole[1::3]]
    assert sorted(job.folder for part in parts for job in part) == sorted(job.folder for job in whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["jepax sweep takes SWEEP", "family_fashion_mnist"]),
        (["famly_fashion_mnist"], ["did you mean family_fashion_mnist?"]),
        (["family_fashion_mnist", "--seeds", "one"], ["--seeds: one", "a list of int"]),
        (["family_fashion_mnist", "--seeds", "1", "1"], ["seeds=[1, 1]", "twice"]),
        (["family_fashion_mnist", "--shard", "3/2"], ["--shard 3/2"]),
        (["family_fashion_mnist", "--shard", "2"], ["--shard 2", "--shard 1/2"]),
        (["family_fashion_mnist", "--shard", "1/2", "3"], ["--shard: 1/2 3 is invalid"]),
        (["family_fashion_mnist", "--shard", "1/--2"], ["--shard 1/--2", "--shard 1/2"]),
        (["family_fashion_mnist", "--seeds", "-1"], ["seeds=[-1]", "must not be negative"]),
        (["family_fashion_mnist", "--sedes", "1"], ["did you mean --seeds?"]),
        (["family_fashion_mnist", "--run-dir"], ["--run-dir: a value is missing"]),
        (["family_fashion_mnist", "--optim.peek-lr", "1"], ["row masked+ema", "did you mean --optim.peak-lr?"]),
        (["family_fashion_mnist", "--seed", "3"], ["--seeds 0 1 2"]),
        (["family_fashion_mnist", "--seeds", "3", "--seeds", "4"], ["duplicate option --seeds"]),
        (["family_fashion_mnist", "--dry-run"], ["no --dry-run"]),
        (["ablations_fashion_mnist", "--method.loss", "l2"], ["row l2 varies method.loss"]),
        (["nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(UserError) as caught:
        plan(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Variant("a/b", "x"), "name='a/b'"),
        (lambda: Variant("..", "x"), "name='..'"),
        (lambda: Sweep("../g", "", (Variant("a", "x"),)), "sweep name='../g'"),
        (lambda: Sweep("g", "", ()), "must not be empty"),
        (lambda: Sweep("g", "", (Variant("a", "x"), Variant("a", "y"))), "twice"),
        (lambda: Sweep("g", "", (Variant("a", "x"),), seeds=(-1,)), "must not be negative"),
    ],
)
def test_bad_sweeps_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("shared", "own", "words"),
    [
        (("--seed", "3"), (), "--seeds 0 1 2"),
        ((), ("--seed", "3"), "--seeds 0 1 2"),
        ((), ("--run-dir", "x"), "--run-dir belongs to the command line"),
        ((), ("--method.encoder.num-heads", "5"), "row a: --method.encoder.num-heads"),
    ],
)
def test_overrides_that_would_be_ignored_or_fail_are_refused(shared, own, words, tmp_path):
    configs.save(Sweep("g", "", (Variant("a", "ijepa_fashion_mnist", own),), shared=shared), tmp_path / "g.yaml")
    with pytest.raises(UserError, match=words):
        plan(str(tmp_path / "g.yaml"))


def test_what_cannot_be_trained_is_refused_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run.training, "train", lambda *given: pytest.fail("trained"))
    rows = (
        Variant("fits", "ijepa_fashion_mnist"),
        Variant("long", "ijepa_fashion_mnist", ("--optim.warmup-epochs", "99")),
    )
    configs.save(Sweep("g", "", rows), tmp_path / "g.yaml")
    tiny = [word for pair in zip(TINY[::2], TINY[1::2], strict=True) for word in pair if "warmup" not in pair[0]]
    wanted = plan(str(tmp_path / "g.yaml"), *tiny, "--run-dir", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"row long: optim\.warmup_epochs=99"):
        run.run_sweep(wanted, print=lambda line: None)


def test_world_models_have_no_column_in_the_table(tmp_path):
    row = Variant("world", "lewm_two_room", ("--eval.protocols", "linear", "knn", "--data.num-episodes", "5"))
    configs.save(Sweep("g", "", (row,)), tmp_path / "g.yaml")
    wanted = plan(str(tmp_path / "g.yaml"), "--run-dir", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"^row world: method lewm has no encoder of images"):
        run.run_sweep(wanted, print=lambda line: None)


def test_runs_of_another_config_are_not_put_into_one_table(tmp_path, monkeypatch):
    """Other seeds of the folder, and other parts, count too."""
    monkeypatch.setattr(run.training, "train", lambda *given: pytest.fail("trained"))
    words = ["family_fashion_mnist", *TINY, "--run-dir", str(tmp_path)]
    before = plan(*words, "--seeds", "0", "--eval.knn.k", "3").jobs[0]
    run.train_config.write_run_config(before.folder, before.config)
    with pytest.raises(UserError, match=r"(?s)row masked\+ema: .*different config.*knn\.k"):
        run.run_sweep(plan(*words, "--seeds", "1"), print=lambda line: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of a file with two rows and two seeds, run from the command line in two parts; no run draws figures."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = (Variant("lejepa", "lejepa_fashion_mnist"), Variant("vicreg", "vicreg_fashion_mnist"))
    configs.save(Sweep("mine", "two rows", rows, seeds=(0, 1)), folder / "mine.yaml")
    words = ["sweep", str(folder / "mine.yaml"), *TINY, "--run-dir", str(folder / "out")]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.figures, "draw_figures", lambda config, folder: drawn.append(folder))
        patch.setattr(run, "clear_jit_caches", lambda: None)
        for part in ("1/2", "2/2"):
            cli.main([*words, "--shard", part])
    assert [path.name for path in drawn] == ["lejepa-seed0", "lejepa-seed1", "vicreg-seed0", "vicreg-seed1"]
    return folder / "out", words


def test_a_sweep_ends_in_one_table_and_one_figure(finished):
    folder, _ = finished
    lines = (folder / "grid.md").read_text().splitlines()
    assert lines[:2] == ["two rows", ""]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| lejepa", "| vicreg"]
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:])
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "grid.csv").open() as file:
        found = list(csv.DictReader(file))
    order = [(each["row"], each["seed"]) for each in found]
    assert order == [("lejepa", "0"), ("lejepa", "1"), ("vicreg", "0"), ("vicreg", "1")]
    for each in found:
        result = json.loads((folder / f"{each['row']}-seed{each['seed']}/evals/step_00000003.json").read_text())
        assert float(each["linear"]) == result["rows"]["trained"]["linear"]["top1"]
        heads = result["rows"]["trained"]["linear"]["trials"]
        assert float(each["validation"]) == max(head["validation_top1"] for head in heads)
        assert float(each["untrained_knn"]) == result["rows"]["untrained"]["knn"]["top1"]
        assert float(each["minutes"]) > 0 and int(each["steps"]) == 3 and int(each["batch_size"]) == 16


def test_baselines_are_measured_once_per_seed_and_no_score_is_shared(finished):
    folder, _ = finished
    kept = sorted(path.name.split("-")[0] for path in (folder / "baselines").iterdir())
    assert kept == ["pixels", "pixels", "untrained", "untrained"]
    rows = [
        json.loads((folder / f"{name}-seed0/evals/step_00000003.json").read_text())["rows"]
        for name in ("lejepa", "vicreg")
    ]
    assert rows[0]["untrained"] == rows[1]["untrained"] and rows[0]["pixels"] == rows[1]["pixels"]
    assert rows[0]["trained"]["effective_rank"] != rows[1]["trained"]["effective_rank"]


def test_a_cached_baseline_is_the_measured_one(finished, monkeypatch):
    """Evaluated again without the cached ones, every baseline is the same."""
    _, words = finished
    job = plan(*words[1:]).jobs[0]
    state = evaluation.load_state(job.config, job.folder)
    monkeypatch.setattr(report, "write_report", lambda results, run, name: run / name)
    fresh = evaluation.evaluate(evaluation.target_from_run(job.config, state, job.folder))[0]["rows"]
    kept = json.loads(table.find_evaluation(job.folder).read_text())["rows"]
    for name in ("untrained", "pixels", "trained"):
        assert fresh[name]["linear"]["top1"] == kept[name]["linear"]["top1"]
        assert fresh[name]["knn"] == kept[name]["knn"]


def test_the_same_command_again_trains_nothing_and_another_config_is_refused(finished, capsys, monkeypatch):
    _, words = finished
    monkeypatch.setattr(run.training, "train", lambda *given: pytest.fail("trained again"))
    cli.main(words)
    assert "| lejepa |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*words, "--optim.peak-lr", "0.1"])
    assert "optim.peak_lr" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_without_its_evaluation_is_continued(finished, capsys, tmp_path):
    words = [*finished[1][:-1], str(tmp_path / "out")]
    folder = shutil.copytree(finished[0], tmp_path / "out")
    lost = folder / "vicreg-seed1" / "evals" / "step_00000003.json"
    before = json.loads(lost.read_text())["rows"]["trained"]
    lost.unlink()
    assert len(table.load_results(load_sweep(words[1]), folder)) == 3
    cli.main(words)
    assert "first step" not in capsys.readouterr().err  # its checkpoint is whole: nothing is trained
    assert json.loads(lost.read_text())["rows"]["trained"]["linear"] == before["linear"]


def test_seconds_are_those_of_all_steps():
    lines = [{"step": 0, "perf/step_time": 5.0}, {"step": 9, "perf/step_time": 0.5}]
    assert table.sum_seconds(lines) == 5.0 + 9 * 0.5


def test_the_table_says_what_is_missing(finished, tmp_path):
    folder, words = finished
    sweep = load_sweep(words[1])

    def said(sweep, folder):
        return table.to_markdown(sweep, folder, table.load_results(sweep, folder)).splitlines()

    assert not any("missing" in line for line in said(sweep, folder))
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    (copy / "vicreg-seed1" / "evals" / "step_00000003.json").unlink()
    assert said(sweep, copy)[-1] == "1 of 4 runs are missing"
    one_seed = dataclasses.replace(sweep, seeds=(0,))
    assert len(table.load_results(one_seed, copy)) == 3  # of whatever seeds: nothing that is done leaves the table
    assert not any("missing" in line for line in said(one_seed, copy))
    (copy / "vicreg-seed1" / table.DIVERGED_FILE).write_text("why\n")
    assert said(one_seed, copy)[-1] == "vicreg, seed 1: why"
    (copy / "lejepa-seed0" / "evals" / "step_00000003.json").unlink()
    assert said(one_seed, copy)[-2:] == ["vicreg, seed 1: why", "1 of 2 runs are missing"]  # of the seeds asked for


def test_an_evaluation_on_the_way_does_not_finish_a_run(finished, tmp_path):
    folder, words = finished
    run_folder = tmp_path / "lejepa-seed0"
    shutil.copytree(folder / "lejepa-seed0", run_folder)
    whole = run_folder / "evals" / "step_00000003.json"
    whole.rename(run_folder / "evals" / "step_00000002.json")
    assert table.find_evaluation(run_folder) is None
    assert len(table.load_results(load_sweep(words[1]), tmp_path)) == 0


@pytest.mark.long
def test_a_run_that_diverges_is_told_and_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "clear_jit_caches", lambda: None)
    row = Variant("lost", "ijepa_fashion_mnist", ("--optim.peak-lr", "1e38", "--method.loss", "l2"))
    configs.save(Sweep("mine", "", (row,), seeds=(0, 1)), tmp_path / "mine.yaml")
    words = ["sweep", str(tmp_path / "mine.yaml"), *TINY, "--run-dir", str(tmp_path / "out")]
    cli.main(words)
    said = capsys.readouterr()
    for number in (0, 1):
        assert f"run {number + 1} of 2: lost, seed {number}" in said.err
        assert f"\nlost, seed {number}: the " in said.out and "| lost |" not in said.out
    assert "missing" not in said.out
    cli.main(words)
    assert "run 1 of 2" not in capsys.readouterr().err


@pytest.mark.long
def test_baselines_of_another_protocol_are_not_taken(finished, tmp_path, monkeypatch):
    """A baseline is named by what decides it: other versions or neighbors, another baseline."""
    folder, words = finished
    job = plan(*words[1:]).jobs[0]
    state = evaluation.load_state(job.config, job.folder)
    monkeypatch.setattr(report, "write_report", lambda results, run, name: run / name)

    def kept(**changes):
        config = dataclasses.replace(job.config, eval=dataclasses.replace(job.config.eval, **changes))
        evaluation.evaluate(evaluation.target_from_run(config, state, job.folder), baseline_cache=tmp_path)
        return {path.name for path in tmp_path.iterdir()}

    first = kept()
    assert len(first) == 2 and first <= {path.name for path in (folder / "baselines").iterdir()}
    assert len(kept(knn=KnnConfig(k=(3,)))) == 4
    monkeypatch.setattr(report, "software_versions", lambda: {"jepax": "another"})
    assert len(kept()) == 6
