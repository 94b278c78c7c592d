"""Checkpoints: whole or not there, checked on the way back."""

import os
import shutil
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import monitoring as registered
from jax.sharding import NamedSharding, PartitionSpec

from jepax.distributed import multihost
from jepax.io import checkpoint, checksums
from jepax.types import UserError
from tests.digest import state_digest


def tree(value=1.0):
    return {"a": jnp.full((4, 8), value), "b": [jnp.arange(3), "text"]}


def flip(path):
    """One bit, in the middle."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_round_trip_with_dtypes(tmp_path):
    checkpoint.save(tmp_path, 3, tree(), {"shift": 2})
    restored = checkpoint.restore(tmp_path, 3, tree(0.0))
    assert restored["b"][1] == "text"
    jax.tree.map(np.testing.assert_array_equal, (restored["a"], restored["b"][0]), (tree()["a"], tree()["b"][0]))
    assert restored["b"][0].dtype == tree()["b"][0].dtype
    assert checkpoint.metadata(tmp_path, 3) == {"shift": 2}


def test_small_arrays_that_every_device_holds_are_saved_whole(tmp_path):
    """Not one slice per device: each shape of a slice would compile a program."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    everywhere = jax.device_put(jnp.ones((8, 24)), NamedSharding(mesh, PartitionSpec()))
    assert jax.device_count() == 8
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        checkpoint.save(tmp_path, 1, {"a": everywhere})
    finally:
        registered.unregister_event_duration_listener(listen)
    assert not compiled


NAMES = ["My [2024] project", "exp[lr=1e-3]", "[!a]", "a*b?", "back\\slash", "100%#{x};$HOME", "a\nb"]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"raw \xff")])
def test_a_folders_name_is_taken_literally(name, tmp_path):
    """Orbax globs, and TensorStore reads a backslash as a slash and refuses other bytes than UTF-8's."""
    folder = tmp_path / name / "checkpoints"
    checkpoint.save(folder, 3, tree())
    restored = checkpoint.restore(folder, 3, tree(0.0))
    np.testing.assert_array_equal(restored["a"], tree()["a"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_cannot_be_read_back_is_no_checkpoint(tmp_path, monkeypatch):
    """Orbax reports success here: it takes the folder for a pattern that matches none."""
    monkeypatch.setattr(checkpoint, "_literal_path", nullcontext)
    folder = tmp_path / "exp[1]"
    with pytest.raises(UserError, match="it was written, but cannot be read"):
        checkpoint.save(folder, 3, tree())
    assert checkpoint.list_steps(folder) == [] and list(folder.iterdir()) == []


def test_the_tree_may_be_donated_while_it_is_written(tmp_path):
    """What is written is what it was, though its memory is overwritten at once."""
    big = {"a": jnp.arange(2_000_000.0)}
    wanted = np.array(big["a"])
    overwrite = jax.jit(lambda t: {"a": t["a"] * 0 - 1}, donate_argnums=0)
    writing = checkpoint.save_async(tmp_path, 1, big)
    for _ in range(5):
        big = overwrite(big)
    jax.block_until_ready(big)
    writing.result()
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 1, big)["a"], wanted)


def test_a_checkpoint_is_called_by_its_step_only_when_it_is_finished(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        checksums, "compute_checksums", lambda folder: seen.append(checkpoint.list_steps(tmp_path)) or {}
    )
    checkpoint.save(tmp_path, 1, tree())
    assert seen == [[]] and checkpoint.list_steps(tmp_path) == [1] and checkpoint.partial_checkpoints(tmp_path) == []


def test_an_unfinished_checkpoint_is_none_and_is_written_again(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree())
    path.rename(path.with_name(path.name + checkpoint.PARTIAL_SUFFIX))
    assert checkpoint.list_steps(tmp_path) == [] and len(checkpoint.partial_checkpoints(tmp_path)) == 1
    assert checkpoint.latest_valid(tmp_path) == (None, {})
    checkpoint.save(tmp_path, 1, tree())
    assert checkpoint.list_steps(tmp_path) == [1] and checkpoint.partial_checkpoints(tmp_path) == []


def test_one_flipped_bit_is_found(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree())
    flip(largest(path))
    with pytest.raises(UserError, match="is corrupt"):
        checkpoint.restore(tmp_path, 1, tree(0.0))


def test_the_newest_valid_one_is_taken_and_corrupt_ones_are_renamed(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tree(float(step)))
    flip(largest(tmp_path / "00000003"))
    step, corrupt = checkpoint.latest_valid(tmp_path)
    assert step == 2 and list(corrupt) == [3] and "is not what was written" in corrupt[3][0]
    checkpoint.quarantine(tmp_path, corrupt)
    assert checkpoint.list_steps(tmp_path) == [1, 2] and (tmp_path / "00000003.corrupt").is_dir()
    shutil.copytree(tmp_path / "00000003.corrupt", tmp_path / "00000003")
    checkpoint.quarantine(tmp_path, [3])
    assert (tmp_path / "00000003.corrupt2").is_dir()


def test_none_valid_is_an_error_and_nothing_is_removed(tmp_path):
    for step in (1, 2):
        flip(largest(checkpoint.save(tmp_path, step, tree())))
    with pytest.raises(UserError, match=r"(?s)no checkpoint in .* is valid.*nothing was removed"):
        checkpoint.latest_valid(tmp_path)
    assert checkpoint.list_steps(tmp_path) == [1, 2]


def test_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.zeros((4, 8)), "c": jnp.zeros(2)})
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.zeros((5, 8)), "b": [jnp.arange(3), "text"]})


def test_a_part_is_restored_and_the_rest_of_the_model_compared_all_the_same(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    like = tree(0.0)
    part = checkpoint.restore(tmp_path, 1, like, only=("['b']",))
    assert part["a"] is None and part["b"][1] == "text"
    np.testing.assert_array_equal(part["b"][0], tree()["b"][0])
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.zeros((5, 8)), "b": like["b"]}, only=("['b']",))


def test_what_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "00000001").write_text("a file in its place")  # the rename at the end meets it
    with pytest.raises(UserError, match=r"(?s)checkpoint .*00000001 could not be written.*the ones before it"):
        checkpoint.save(tmp_path, 1, tree())
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


@pytest.mark.parametrize("step", ["folder", "begin", "end"])
def test_a_peer_that_is_lost_while_it_is_written_is_no_error_of_the_disk(tmp_path, monkeypatch, step):
    """The same command goes on: exit code 75."""

    def lost(*_: object) -> None:
        raise (
            TimeoutError("Timed out at barrier `folder`: DEADLINE_EXCEEDED")
            if step != "folder"
            else multihost.PeerLostError()
        )

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "all_gather_str", lost if step == "folder" else lambda text: [text])
    response = SimpleNamespace(result=lost)
    monkeypatch.setattr(checkpoint.ocp, "save_async", lost if step == "begin" else lambda path, arrays: response)
    with pytest.raises(multihost.PeerLostError):
        checkpoint.save(tmp_path, 1, tree())


def test_digests_are_equal_for_equal_states_alone():
    assert state_digest(tree()) == state_digest(tree())
    different = [tree(2.0), {**tree(), "a": jnp.full((8, 4), 1.0)}, {**tree(), "a": tree()["a"].astype(jnp.bfloat16)}]
    different.append({"c": tree()["a"], "b": tree()["b"]})
    assert len({state_digest(each) for each in [tree(), *different]}) == 5


def test_what_a_failed_save_left_is_removed_though_a_thread_of_it_makes_it_anew(tmp_path):
    folder = tmp_path / "00000003.part"
    folder.mkdir()

    def late():
        while folder.exists():
            time.sleep(0.001)
        (folder / "arrays").mkdir(parents=True)

    thread = threading.Thread(target=late)
    thread.start()
    checkpoint._remove_partial(folder)
    thread.join()
    assert not folder.exists()
