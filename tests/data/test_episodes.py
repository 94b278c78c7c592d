"""A folder of episodes is read as it was written, is the same however often writing was interrupted, or is refused."""

import copy
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from jepax.data import episodes as module
from jepax.data.episodes import Episodes, append_rows, concatenate_ranges, open_episodes, write_episodes
from jepax.io import lock
from jepax.types import UserError

SETTINGS = {"environment": "none", "seed": 3}


def make_episodes(lengths, seed=0) -> Episodes:
    """Random numbers; the last row of an episode has no action."""
    random, rows = np.random.default_rng(seed), sum(lengths)
    actions = random.normal(2, 3, (rows, 2)).astype(np.float32)
    actions[np.cumsum(lengths) - 1] = 0
    states = random.normal(size=(rows, 3)).astype(np.float32)
    frames = random.integers(0, 256, (rows, 4, 5, 3), np.uint8)
    return Episodes(actions, states, np.array(lengths), frames)


PARTS = [make_episodes(lengths, seed) for seed, lengths in enumerate([[3, 1], [5], [2, 2, 4]])]


def write(folder: Path, parts=PARTS, settings=SETTINGS) -> Path:
    write_episodes(folder, settings, len(parts), lambda number: parts[number])
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.name != lock.LOCK_FILE]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_read_as_it_was_written(tmp_path):
    found = open_episodes(write(tmp_path / "all"))
    for name in ("frames", "actions", "states", "lengths"):
        array = getattr(found, name)
        expected = np.concatenate([getattr(part, name) for part in PARTS])
        np.testing.assert_array_equal(array, expected)
        # Plain files, which other programs read.
        plain = np.load(tmp_path / "all" / f"{name}.npy", allow_pickle=False)
        np.testing.assert_array_equal(plain, expected)
        assert plain.dtype == array.dtype == expected.dtype
    assert found.starts.tolist() == [0, 3, 4, 9, 11, 13] and len(found) == 6
    info = json.loads((tmp_path / "all/episodes.json").read_text())
    assert info.items() >= {**SETTINGS, "episodes": 6, "rows": 17}.items()
    assert not (tmp_path / "all/collecting.json").exists()


def test_it_is_not_read_into_memory_and_not_copied(tmp_path):
    found = open_episodes(write(tmp_path / "all"))
    assert isinstance(found.frames.base, np.memmap) and not found.frames.flags.writeable
    assert found.__reduce_ex__(4)[1] == (tmp_path / "all",)  # a worker gets the path alone
    again, own = copy.deepcopy(found), copy.deepcopy(PARTS[0])
    assert isinstance(again.frames.base, np.memmap)
    np.testing.assert_array_equal(again.frames, found.frames)
    np.testing.assert_array_equal(own.frames, PARTS[0].frames)


def test_ranges():
    found = concatenate_ranges(np.array([5, 0, 7]), np.array([2, 0, 3]))
    assert found.tolist() == [5, 6, 7, 8, 9] and len(concatenate_ranges(np.array([4]), np.array([0]))) == 0


class Killed(BaseException):
    """An end that no code of ours expects."""


@pytest.mark.parametrize("after", range(30))
def test_writing_that_was_interrupted_goes_on_to_the_same_bytes(tmp_path, monkeypatch, after):
    """Interrupted at each flush and each replacement of a file, in turn: before it, so that it did not happen."""
    expected, calls = digests(write(tmp_path / "whole")), iter(range(after + 1))

    def interrupted(real):
        def call(*arguments):
            if next(calls, after) == after:
                raise Killed
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "append_rows", interrupted(append_rows))
        patch.setattr(module.atomic, "atomic_write", interrupted(module.atomic.atomic_write))
        patch.setattr(module.atomic, "fsync", interrupted(module.atomic.fsync))
        finished = False
        try:
            finished = bool(write(tmp_path / "parts"))
        except Killed:
            with pytest.raises(UserError, match="is no complete folder of episodes"):
                open_episodes(tmp_path / "parts")
    assert finished == (after == 29)  # three parts of four files and their flushes, then three other files
    made = []
    write_episodes(tmp_path / "parts", SETTINGS, len(PARTS), lambda number: made.append(number) or PARTS[number])
    assert digests(tmp_path / "parts") == expected
    assert made == list(range((after - 1) // 9 if after else 0, 3))  # parts that were there are not made again


def test_what_a_part_left_behind_is_overwritten(tmp_path):
    append_rows(tmp_path / "x.npy", np.arange(6), 0)
    append_rows(tmp_path / "x.npy", np.arange(2) + 9, 3)
    assert np.load(tmp_path / "x.npy", allow_pickle=False).tolist() == [0, 1, 2, 9, 10]


def test_the_header_of_a_very_long_file_is_as_long(tmp_path):
    lengths = set()
    for rows in (1, 10**6, 10**15):
        with (tmp_path / "x.npy").open("w+b") as file:
            description = {"descr": "<f4", "fortran_order": False, "shape": (rows, 2)}
            np.lib.format.write_array_header_1_0(file, description)
            lengths.add(file.tell())
    assert len(lengths) == 1


def test_the_same_again_does_nothing_and_others_are_refused(tmp_path):
    folder = write(tmp_path / "all")
    before = digests(folder)
    assert not write_episodes(folder, SETTINGS, 3, lambda number: pytest.fail("made again"))
    assert digests(folder) == before
    with pytest.raises(UserError, match="holds other episodes"):
        write(folder, settings=SETTINGS | {"seed": 4})
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/collecting.json").write_text(json.dumps({"settings": {"seed": 4}, "progress": [0, 0, 0]}))
    with pytest.raises(UserError, match="was begun with other settings"):
        write(tmp_path / "begun")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "frames.npy").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty, it holds frames\.npy"):
        write(tmp_path)
    assert (tmp_path / "frames.npy").read_text() == "mine"


def object_array() -> bytes:
    return (
        b"\x93NUMPY\x01\x00"
        + (118).to_bytes(2, "little")
        + (b"{'descr': '|O', 'fortran_order': False, 'shape': (17, 2), }".ljust(117) + b"\n")
    )


def npy(array) -> bytes:
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


ZEROS = np.zeros((17, 4, 5, 3), np.uint8)
FOREIGN = {
    "missing": ("frames", None, "No such file"),
    "empty": ("frames", b"", "EOF"),
    "text": ("frames", b"hello, this is a text", "magic string"),
    "cut": ("frames", npy(ZEROS)[:-1], "mmap length"),
    "objects": ("actions", object_array(), "Python objects"),
    "gray": ("frames", npy(ZEROS[..., 0]), "uint8 with 3 axes instead of uint8 with 4"),
    "float": ("frames", npy(ZEROS.astype(np.float32)), "float32 with 4 axes"),
    "shorter": ("frames", npy(ZEROS[:-1]), "do not have the rows"),
    "other lengths": ("lengths", npy(np.array([17])), "is not what"),
    "other actions": ("actions", npy(np.ones((17, 2), np.float32)), "is not what"),
}


@pytest.mark.parametrize(("name", "content", "said"), FOREIGN.values(), ids=FOREIGN)
def test_corrupt_and_foreign_files_are_refused_in_one_line(tmp_path, name, content, said):
    path = write(tmp_path / "all") / f"{name}.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        open_episodes(path.parent)
    assert len(str(caught.value).splitlines()) == 1 and str(path.parent) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1}', '{"version": 1, "sha256": {"frames": 3}}', None]
)
def test_other_descriptions_are_refused_in_one_line(tmp_path, text):
    path = write(tmp_path / "all") / "episodes.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=r"no complete folder|of version|has no sha256") as caught:
        open_episodes(path.parent)
    assert len(str(caught.value).splitlines()) == 1


def test_episodes_without_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="do not have the rows"):
        open_episodes(write(tmp_path / "none", [make_episodes([3, 0, 2])]))
