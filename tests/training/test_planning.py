"""A world model through the commands: trained, evaluated by planning, resumed, from simulated episodes and a folder."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jepax import cli
from jepax.data.episodes import EPISODES_FILE
from jepax.distributed import preemption
from jepax.evals.planning import PlanConfig
from jepax.evals.protocols import EvalConfig
from jepax.io import checkpoint
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointManager
from jepax.optim import Optimizer
from jepax.training import evaluation, planning
from jepax.training.config import Config
from jepax.training.setup import abstract_state
from jepax.types import UserError
from jepax.viz import figures
from tests.contracts.shrink import shrunk
from tests.digest import state_digest

PLAN = PlanConfig(num_episodes=8, num_samples=8, num_iterations=2, num_elites=4, horizon=2, budget=20)
STEPS = 6


def config():
    """A tiny world model, and 8 held-out episodes."""
    small = shrunk("lewm_two_room")
    shallow = {name: replace(getattr(small.method, name), depth=1) for name in ("encoder", "predictor")}
    data, optim = replace(small.data, num_episodes=40), replace(small.optim, warmup_epochs=0.03)
    return replace(
        small,
        method=replace(small.method, **shallow),
        data=data,
        optim=optim,
        eval=EvalConfig(protocols=("plan",), plan=PLAN),
    )


@pytest.fixture(scope="module", autouse=True)
def drawn():
    """Paths of the figures, which are made, but not rendered: that takes long."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda figure, path: found.append(path) or path)
        yield found


def run(capsys, *words):
    """The results of a command that evaluates, and what it prints."""
    cli.main([*map(str, words)])
    out = capsys.readouterr().out
    files = [line for line in out.splitlines() if line.endswith(".json")]
    return json.loads(Path(files[-1]).read_text()), out


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    configs.save(config(), path)
    return path


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a run, and the tasks that each agent met."""
    folder, met = tmp_path_factory.mktemp("runs") / "tiny", []
    with pytest.MonkeyPatch.context() as patch:
        real = planning.run_agent

        def recorded(env, agent, task, key):
            met.append((agent, task, key))
            return real(env, agent, task, key)

        patch.setattr(planning, "run_agent", recorded)
        cli.main(["train", str(settings), "--run-dir", str(folder)])
    return folder, met


def test_training_ends_with_an_evaluation_by_planning(finished, drawn):
    folder, _ = finished
    results = json.loads((folder / f"evals/step_{STEPS:08d}.json").read_text())
    assert list(results["rows"]) == list(planning.AGENTS) and results["step"] == STEPS
    assert results["protocol"]["num_samples"] == 8 and results["protocol"]["protocols"] == ["plan"]
    assert results["protocol"]["episodes"] == {"published": 8, "same_region": 8, "other_region": 8}
    assert results["target"] == {"folder": "tiny", "recipe": "lewm_two_room"}
    for row in results["rows"].values():
        assert row["plan"]["published"]["published"]["episodes"] == 8
    assert set(results["rows"]["trained"]["health"]) == {
        *("prediction_error", "position_probe", "effective_rank", "embedding_variance", "rank_correlation")
    }
    assert "health" in results["rows"]["untrained"] and "health" not in results["rows"]["random"]
    assert folder / "figures/curves.png" in drawn


def test_every_agent_meets_the_same_episodes(finished):
    _, met = finished
    by_agent = [met[first : first + 3] for first in range(0, len(met), 3)]
    assert len(by_agent) == len(planning.AGENTS)
    for others in by_agent[1:]:
        for (_, task, key), (_, other, other_key) in zip(by_agent[0], others, strict=True):
            assert key is other_key and task.budget == other.budget
            np.testing.assert_array_equal(task.start, other.start)
            np.testing.assert_array_equal(task.goal, other.goal)


def test_the_same_evaluation_again_and_another_one(finished, capsys, tmp_path):
    folder, _ = finished
    own = json.loads((folder / f"evals/step_{STEPS:08d}.json").read_text())
    again, out = run(capsys, "evaluate", folder)
    assert again["rows"] == own["rows"]
    for word in ("trained model", "true state", "same region", "rank correlation", "start inside the goal"):
        assert word in out

    # Another step with other settings, into another folder: the file names the run.
    words = ["--step", "4", "--eval.plan.seed", "7", "--run-dir", tmp_path]
    other, out = run(capsys, "evaluate", folder, *words)
    assert other["protocol"]["seed"] == 7 and other["step"] == 4 and other["target"]["folder"] == "tiny"
    assert f"{tmp_path}/evals/tiny-step_00000004-plan-" in out


def test_a_run_that_is_resumed_is_evaluated_to_the_same_numbers(finished, settings, capsys, tmp_path, monkeypatch):
    save = CheckpointManager.save

    def stop(manager, step, *rest):
        save(manager, step, *rest)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CheckpointManager, "save", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", str(settings), "--run-dir", str(tmp_path / "tiny")])
    assert stopped.value.code == preemption.EXIT_RETRY
    monkeypatch.undo()
    results, _ = run(capsys, "train", settings, "--run-dir", tmp_path / "tiny")
    own = json.loads((finished[0] / f"evals/step_{STEPS:08d}.json").read_text())
    assert results["rows"] == own["rows"]
    digests = [
        state_digest(evaluation.load_state(config(), each, only=checkpoint.ALL_ARRAYS))
        for each in (finished[0], tmp_path / "tiny")
    ]
    assert digests[0] == digests[1]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "episodes"
    cli.main(["collect", "two_room", "--out", str(folder), "--image-size", "32", "--num-episodes", "40"])
    return folder


def from_folder(folder):
    return replace(config().data, dataset="episodes", root=str(folder))


@pytest.mark.long
def test_a_folder_of_episodes_is_trained_on_and_planned_in(settings, episodes, capsys, tmp_path):
    words = ["--data.dataset", "episodes", "--data.root", episodes, "--run-dir", tmp_path / "run"]
    results, _ = run(capsys, "train", settings, *words)
    assert results["data"]["root"] == str(episodes) and results["protocol"]["episodes"]["published"] == 8
    again, _ = run(capsys, "evaluate", tmp_path / "run")
    assert again["rows"] == results["rows"] and list(again["rows"]) == list(planning.AGENTS)


def test_plans_are_tried_in_held_out_episodes_alone(episodes):
    """A folder has one pool of episodes, of which a run trains on some."""
    source, env = planning.open_held_out(replace(config(), data=from_folder(episodes)))
    assert 0 < len(source.members) < len(source.episodes) and env.image_size == 32
    owner = np.repeat(np.arange(len(source.episodes)), source.episodes.lengths)
    held_out = {tuple(row) for row in source.episodes.states[np.isin(owner, source.members)]}
    start, goal = planning.held_out_pairs(source, 25)
    assert len(start) > 20 and all(tuple(row) in held_out for row in (*start, *goal))


def test_episodes_of_another_world_are_trained_on_but_not_planned_in(episodes, tmp_path):
    for name in episodes.iterdir():
        if name.name not in (EPISODES_FILE, "lock"):
            (tmp_path / name.name).symlink_to(name)
    info = json.loads((episodes / EPISODES_FILE).read_text())
    for environment in ("maze", None):
        (tmp_path / EPISODES_FILE).write_text(json.dumps(info | {"environment": environment}))
        with pytest.raises(
            UserError, match=rf"^data\.root=\S+: .* of its episodes, {environment}, and jepax has two_room"
        ):
            planning.open_held_out(replace(config(), data=from_folder(tmp_path)))


def fails(capsys, *words):
    """The message of a command that ends with exit code 2, and before anything is computed."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*map(str, words)])
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Traceback" not in error and len(error.splitlines()) <= 2, error
    return error


def test_what_does_not_fit_a_world_model_is_one_line(finished, settings, capsys, tmp_path):
    folder, _ = finished
    encoder = "method lewm has no encoder of images for probes or exports; a world model is evaluated by"
    assert encoder in fails(capsys, "evaluate", folder, "--protocols", "linear")
    assert encoder in fails(capsys, "export", folder, tmp_path / "exported")
    assert "--encoder and --pool are for probes" in fails(capsys, "evaluate", folder, "--pool", "sum")
    words = ["--data.dataset", "synthetic", "--eval.protocols", "knn", "--run-dir", tmp_path / "a"]
    assert "method lewm reads clips with actions, but the data has" in fails(capsys, "train", settings, *words)
    size = fails(capsys, "train", "lewm_two_room", "--data.canvas-size", "64", "--run-dir", tmp_path / "a")
    assert "data.canvas_size=64 does not fit data.dataset=two_room" in size
    skip = fails(capsys, "evaluate", folder, "--data.frame-skip", "2")
    assert "method.action_dim=10, but the clips need 4" in skip
    assert "bench-data reads photos" in fails(capsys, "bench-data", settings)
    assert not (tmp_path / "a").exists() and not (tmp_path / "exported").exists()


def test_only_world_models_are_evaluated_by_planning(capsys, tmp_path):
    images = Config()
    with pytest.raises(
        UserError, match=r"^eval\.protocols=plan is for world models, and the run's method, ijepa, is none"
    ):
        planning.evaluate_planning(images, abstract_state(images.method, Optimizer(images.optim, 1, 0)), tmp_path)
    words = ["train", "ijepa_fashion_mnist", "--data.dataset", "synthetic", "--eval.protocols", "plan"]
    said = fails(capsys, *words, "--run-dir", tmp_path / "run")
    assert "eval.protocols=plan needs episodes with actions, and data.dataset=synthetic has none" in said
