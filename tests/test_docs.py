"""The documentation is true: files it shows are the files, and commands it gives are commands."""

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
import yaml

from jepax import cli
from jepax.commands import COMMANDS
from jepax.commands.sweep import Sweep
from jepax.commands.train import Train
from jepax.data import open_source
from jepax.data.episodes import open_episodes, read_info
from jepax.data.simulate import POLICIES, make_environment, render, simulate
from jepax.envs import ENVIRONMENTS, Expert
from jepax.evals.agents import PolicyAgent
from jepax.evals.planning import PlanConfig, goals_in_data, make_tasks, run_agent, summarize
from jepax.io import config_yaml as configs
from jepax.methods import MethodConfig
from jepax.planners import PLANNERS
from jepax.recipes import RECIPES
from jepax.sweeps import Sweep as SweepDefinition
from jepax.types import ImageBatch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(command, pages=PAGES):
    """Every `jepax COMMAND ...` in the pages' shell blocks, without comments."""
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[2:] for line in words if line[1:2] == [command] and line[0].rsplit("/")[-1] == "jepax"]


def test_the_page_on_methods_shows_a_method_that_works():
    """Every parameter of its tiny recipe gets a gradient."""
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    names: dict = {"__name__": "simsiam"}
    try:
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(code, "docs/add_a_method.md", "exec"), names)
        config = RECIPES["simsiam_fashion_mnist"]().method.tiny()
    finally:
        MethodConfig.registry.pop("simsiam", None)
        RECIPES.pop("simsiam_fashion_mnist", None)
    images = ImageBatch(
        np.full((8, 24, 24, 1), 99, np.uint8), np.full((8, 2), 24, np.int32), np.arange(8, dtype=np.int32)
    )
    images.canvas[:, ::2, 3:12] += np.arange(8, dtype=np.uint8)[:, None, None, None] * 9
    method = config.build(total_steps=3, key=jr.key(0))
    loss, grads = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: m.loss(images, key=jr.key(1))[0]))(method)
    assert 0 < loss < 4
    assert all(np.any(leaf) for leaf in jax.tree.leaves((grads.encoder.stack, grads.projector.linears[0].weight)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads.predictor))


def test_the_pages_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(commands("train")) > 5
    for name in ("train", "sweep", "bench", "bench-data", "pack", "collect"):
        assert commands(name), name
        for words in commands(name):
            words = [word.replace("PATH", "/data").replace("RECIPE", "ijepa_fashion_mnist") for word in words]
            command = COMMANDS[name].read(name, words)
            if name == "sweep":
                assert command.plan().jobs
            elif name not in ("pack", "collect"):
                assert command.config()


def test_the_readmes_commands_do_not_refuse_each_other():
    """Whoever tries them one after the other: a folder holds the run of one config."""
    folders = {Path("runs/ijepa_fashion_mnist"): RECIPES["ijepa_fashion_mnist"]()}  # make demo's
    for words in commands("train", PAGES[:1]):
        command = Train.read("train", [word.replace("PATH", "/data") for word in words])
        if not command.dry_run and Path(words[0]).suffix != ".yaml":
            config = command.config()
            assert folders.setdefault(command.folder(config), config) == config, words


def test_the_pages_grid_is_one(tmp_path):
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    path = tmp_path / "momentum.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert configs.load(SweepDefinition, path).name == "momentum"
    assert len(Sweep.read("sweep", [str(path)]).plan().jobs) == 4


SCHEDULED = [(0, 0, False), (1, 0, False), (2, 0, False), (75, 99, True)]
SCHEDULED += [(code, restarts, restarts < 20) for code in (134, 137, 143) for restarts in (0, 19, 20)]


@pytest.mark.parametrize("code, restarts, again", SCHEDULED)
def test_schedulers_begin_again_where_that_helps(tmp_path, code, restarts, again):
    """Code 2 is for somebody to fix; 134, 137 and 143 are of processes that lost a peer or were killed."""
    text = (ROOT / "docs" / "many_hosts.md").read_text()
    for name, line in (("srun", f"exit {code}"), ("scontrol", "echo scontrol $@")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    script = re.search(r"```sh\n(#!/bin/bash.*?)```", text, re.DOTALL)[1]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # unset at the first start
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "scontrol requeue 7\n" if again else "")
    job = next(yaml.safe_load_all(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]))["spec"]
    rules = [rule for rule in job["podFailurePolicy"]["rules"] if code in rule.get("onExitCodes", {}).get("values", ())]
    assert [rule["action"] for rule in rules] == {2: ["FailJob"], 75: ["Ignore"]}.get(code, [])
    assert job["backoffLimit"] > 0 and job["template"]["spec"]["restartPolicy"] == "Never"


def examples_of(heading):
    """The Python blocks of a section of the page on world models."""
    text = (ROOT / "docs" / "world_models.md").read_text()
    section = re.search(rf"\n## {heading}\n(.*?)\n## ", text, re.DOTALL)[1]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


@pytest.fixture
def windy_field():
    names: dict = {"__name__": "windy_field"}
    try:
        exec(compile(examples_of("Add an environment"), "docs/world_models.md", "exec"), names)
        yield ENVIRONMENTS["windy_field"]()
    finally:
        ENVIRONMENTS.pop("windy_field", None)


def test_the_page_on_world_models_shows_an_environment_that_works(windy_field):
    """Images are of the state, the wind differs by key, and the expert succeeds in every task."""
    state = np.array([100.0, 30.0], np.float32)
    image = render(windy_field, state[None])[0]
    assert image.shape == (32, 32, 3) and np.argwhere(image[..., 1] == image[..., 1].min())[0].tolist() == [4, 14]
    action = np.array([2.0, -0.5], np.float32)
    for key in (jr.key(0), jr.key(1)):
        np.testing.assert_allclose(windy_field.step(state, action, key), [105, 27.5], atol=2.5)
    assert np.any(windy_field.step(state, action, jr.key(0)) != windy_field.step(state, action, jr.key(1)))

    episodes = simulate(windy_field, POLICIES["expert"], 64, seed=0)
    in_data = goals_in_data(episodes.states, episodes.starts, episodes.lengths, 25)
    tasks = make_tasks(windy_field, in_data, PlanConfig(num_episodes=20))
    assert list(tasks) == ["published", "same_region"]
    for task in tasks.values():
        outcome = run_agent(windy_field, PolicyAgent(windy_field, Expert()), task, jr.key(0))
        assert summarize(windy_field, task, outcome)["any_step"]["percent"] == 100


def test_the_page_on_world_models_collects_and_opens_its_environment(windy_field, tmp_path, capsys):
    cli.main(["collect", "windy_field", "--out", str(tmp_path / "windy"), "--num-episodes", "20", "--max-steps", "40"])
    assert "20 episodes of windy_field" in capsys.readouterr().out
    config = RECIPES["lewm_two_room"]()
    config = replace(config, data=replace(config.data, dataset="episodes", root=str(tmp_path / "windy")))
    source = open_source(config.data, "validation")
    assert source.load(0).frames.shape == (4, 32, 32, 3) and config.method.action_dim == source.frame_skip * 2
    assert make_environment(read_info(tmp_path / "windy")["environment"], 32) == windy_field


def test_the_page_on_world_models_shows_a_planner_that_works():
    names: dict = {"__name__": "hill_climbing"}
    try:
        exec(compile(examples_of("Add a planner"), "docs/world_models.md", "exec"), names)
        planner = PLANNERS["hill_climbing"](horizon=3, num_samples=200, num_iterations=15)
    finally:
        PLANNERS.pop("hill_climbing", None)
    target = np.array([[0.5, -0.7], [0.1, 0.9], [-0.4, 0.2]], np.float32)

    def cost(candidates):
        return ((candidates - target) ** 2).sum(axis=(1, 2))

    plan = jax.jit(lambda key, start: planner.plan(cost, key, start=start, bounds=(-0.5, 0.5)))
    found = plan(jr.key(0), planner.cold_start(2))
    assert np.abs(found.actions - target.clip(-0.5, 0.5)).max() < 0.15
    np.testing.assert_allclose(found.cost, cost(found.actions[None])[0], rtol=1e-5)
    assert found.lowest_costs.shape == (15,)


def test_the_page_on_world_models_writes_episodes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(examples_of("Collect your own episodes"), "docs/world_models.md", "exec"), {"__name__": "mine"})
    found = open_episodes(tmp_path / "episodes/mine")
    assert len(found) == 2 and found.frames.shape == (30, 32, 32, 3)
