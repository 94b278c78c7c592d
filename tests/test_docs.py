"""The documentation is true: files it shows are the files, and commands it gives are commands."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
import yaml

from jepax.commands import COMMANDS
from jepax.commands.sweep import Sweep
from jepax.commands.train import Train
from jepax.io import config_yaml as configs
from jepax.methods import MethodConfig
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
