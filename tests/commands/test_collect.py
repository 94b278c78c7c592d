"""`jepax collect` writes the episodes that a run simulates, to the same bytes however often it was interrupted."""

import hashlib
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from jepax import cli
from jepax.data import DataConfig, collect, open_source
from jepax.data.episodes import open_episodes
from jepax.types import UserError

SMALL = ["--image-size", "32", "--num-episodes", "24"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of 6 episodes."""
    monkeypatch.setattr(collect, "PART_BYTES", 6 * 101 * 32 * 32 * 3)


def run(*words):
    cli.main(["collect", "two_room", *words])


def digests(folder):
    files = [path for path in folder.iterdir() if path.name != "lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_writes_what_a_run_simulates(tmp_path, capsys):
    run("--out", str(tmp_path / "all"), *SMALL)
    assert re.fullmatch(
        r"\S+/all: 24 episodes of two_room \(expert, seed 0\), [\d,]+ frames, \d+ MB, \d+ s\n", capsys.readouterr().out
    )
    own, found = DataConfig(dataset="two_room", canvas_size=32, num_episodes=24), open_episodes(tmp_path / "all")
    simulated = open_source(own, "train")
    read = open_source(DataConfig(dataset="episodes", root=str(tmp_path / "all")), "train")
    rows = np.arange(0, len(read), 17)
    for name in ("frames", "actions"):
        a, b = (getattr(source.load_batch(rows)[0], name) for source in (simulated, read))
        np.testing.assert_array_equal(a, b)
    info = json.loads((tmp_path / "all/episodes.json").read_text())
    assert info["episodes"] == 24 and info["rows"] == len(found.frames) and info["policy"] == "expert"

    # Again: nothing is done, and other episodes are refused.
    before = digests(tmp_path / "all")
    run("--out", str(tmp_path / "all"), *SMALL)
    assert capsys.readouterr().out.endswith("frames: was complete already\n")
    for other in (["--seed", "1"], ["--policy", "random"], ["--max-steps", "50"]):
        with pytest.raises(SystemExit) as caught:
            run("--out", str(tmp_path / "all"), *SMALL, *other)
        assert caught.value.code == 2
        assert capsys.readouterr().err == (
            f"jepax: {tmp_path / 'all'} holds other episodes; choose another folder, or remove it\n"
        )
    assert digests(tmp_path / "all") == before


def test_killed_between_parts_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    real, rendered = collect.render, []

    def fails_at_the_third_part(*arguments):
        rendered.append(1)
        if len(rendered) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(collect, "render", fails_at_the_third_part)
    config = collect.CollectConfig(num_episodes=24, image_size=32)
    with pytest.raises(KeyboardInterrupt):
        collect.collect("two_room", tmp_path / "parts", config)
    with pytest.raises(UserError, match="is no complete folder"):
        open_episodes(tmp_path / "parts")
    collect.collect("two_room", tmp_path / "parts", config)
    assert len(rendered) == 3 + 2  # the first two parts were there
    monkeypatch.undo()
    collect.collect("two_room", tmp_path / "whole", config)
    found = [digests(tmp_path / name) for name in ("parts", "whole")]
    assert found[0] == found[1] and set(found[0]) == {
        *(f"{name}.npy" for name in ("frames", "actions", "states", "lengths")),
        "episodes.json",
    }


SLOW = """
import sys, time
from jepax import cli
from jepax.data import collect
plain, collect.PART_BYTES = collect.render, 1
def slow(env, states):
    time.sleep(0.2)
    return plain(env, states)
collect.render = slow
cli.main(sys.argv[1:])
"""


@pytest.mark.long
def test_killed_for_real_it_goes_on_to_the_same_bytes(tmp_path):
    progress = tmp_path / "parts" / "collecting.json"
    command = [sys.executable, "-c", SLOW, "collect", "two_room", *SMALL, "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "parts")], stdout=subprocess.DEVNULL)
    while not progress.exists() or json.loads(progress.read_text())["progress"][0] < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() != 0 and progress.exists()
    for name in ("parts", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True, stdout=subprocess.DEVNULL)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mars"], "unknown environment 'mars'"),
        (["two_rom"], "did you mean two_room"),
        (["two_room", "--num-episodes", "0"], "--num-episodes 0 must be at least 1"),
        (["two_room", "--policy", "best"], "--policy"),
        (["two_room", "--seed", "-1"], "--seed"),
        (["two_room", "--image-size", "33"], "image_size=33"),
        (["two_room_pldm", "--image-size", "32"], "two_room_pldm draws images of 65 pixels"),
        ([], "jepax collect takes ENVIRONMENT"),
    ],
)
def test_what_is_not_understood_is_named(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["collect", *words])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and len(error.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_the_default_folder_and_other_environments(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["collect", "two_room_pldm", "--num-episodes", "3", "--policy", "random", "--max-steps", "12"])
    found = open_episodes(tmp_path / "episodes/two_room_pldm")
    assert found.frames.shape[1:] == (65, 65, 2) and len(found) == 3 and found.lengths.max() <= 13
    assert "3 episodes of two_room_pldm (random, seed 0)" in capsys.readouterr().out
