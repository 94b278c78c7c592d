"""The order of examples is a function of seed and position, whatever reads them."""

import itertools
import time
from pathlib import Path
from typing import ClassVar

import equinox as eqx
import numpy as np
import pytest

from jepax.data import batches, iter_once
from jepax.data.loader import epoch_permutation
from jepax.data.sources import CorruptExampleError, Source, synthetic
from jepax.types import UserError


@pytest.fixture
def source():
    return synthetic.open_split("train", images=10, canvas_shape=(4, 4, 1))


def rows_seen(source, stream):
    """Row of each example, recovered from its pixels."""
    images, _ = source.load_batch(np.arange(len(source)))
    known = {image.tobytes(): row for row, image in enumerate(images.canvas)}
    return [known[picture.tobytes()] for images in stream for picture in images.canvas]


def shared_memory():
    return set(Path("/dev/shm").glob("psm_*"))


def indices(stream):
    return np.concatenate([images.index for images in stream]).tolist()


def test_each_epoch_is_another_permutation_and_epochs_meet_within_a_batch(source):
    rows = rows_seen(source, batches(source, batch_size=4, steps=10, seed=0))
    epochs = [rows[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_neighbouring_seeds_share_no_epoch():
    orders = {epoch_permutation(50, seed, epoch).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_order_keeps_no_structure():
    order = epoch_permutation(60_000, 0, 0).astype(float)
    for lag in (1, 2, 16, 256):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(60_000)


def test_order_is_written_in_stone():
    assert epoch_permutation(12, 0, 0).tolist() == STONE
    assert not epoch_permutation(12, 0, 0).flags.writeable


STONE = [0, 8, 9, 3, 7, 5, 1, 11, 2, 10, 6, 4]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 3])
def test_start_and_threads_change_nothing(source, threads, start):
    whole = list(batches(source, batch_size=4, steps=6, seed=1))
    part = list(batches(source, batch_size=4, steps=6, seed=1, start=start, num_threads=threads))
    assert len(part) == 6 - start
    for one, other in zip(whole[start:], part, strict=True):
        np.testing.assert_array_equal(one.canvas, other.canvas)
        np.testing.assert_array_equal(one.label, other.label)
    assert indices(part) == list(range(4 * start, 24))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_split_each_batch(source, count):
    whole = list(batches(source, batch_size=4, steps=3, seed=1))
    shares = [
        list(batches(source, batch_size=4, steps=3, seed=1, process_index=process, process_count=count))
        for process in range(count)
    ]
    for images, *parts in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(images.canvas, np.concatenate([part.canvas for part in parts]))
        np.testing.assert_array_equal(images.index, np.concatenate([part.index for part in parts]))


def test_workers_change_nothing_and_leave_no_shared_memory(source):
    before = shared_memory()
    expected = rows_seen(source, batches(source, batch_size=4, steps=5, seed=1, start=1))
    stream = batches(source, batch_size=4, steps=500, seed=1, start=1, num_threads=1, num_workers=2)
    seen = rows_seen(source, itertools.islice(stream, 4))
    stream.close()
    assert seen == expected
    patience = time.monotonic() + 10  # Grain frees what was handed over in a thread of its own
    while not shared_memory() <= before and time.monotonic() < patience:
        time.sleep(0.05)
    assert shared_memory() <= before


def test_a_single_picture_can_be_trained_on():
    lone = synthetic.open_split("train", images=1, canvas_shape=(4, 4, 3))
    (images,) = batches(lone, batch_size=3, steps=1, seed=0)
    assert images.canvas.shape == (3, 4, 4, 3) and images.index.tolist() == [0, 1, 2]


def test_positions_past_31_bits_wrap(source):
    start = 2**31 // 4
    (images,) = batches(source, batch_size=4, steps=start + 1, start=start, seed=0)
    assert images.index.tolist() == [0, 1, 2, 3]


def test_finished_runs_get_nothing(source):
    assert list(batches(source, batch_size=4, steps=3, start=3, seed=0)) == []


@pytest.mark.parametrize("size, count", [(0, 1), (6, 4)])
def test_sizes_that_do_not_fit_are_refused(source, size, count):
    with pytest.raises(UserError, match=f"batch_size={size}"):
        batches(source, batch_size=size, steps=1, seed=0, process_count=count)


@pytest.mark.parametrize("size", [3, 5, 10, 16])
def test_sweep_sees_every_example_once_in_order(source, size):
    swept = list(iter_once(source, size))
    assert all(images.canvas.shape == (size, 4, 4, 1) for images, _ in swept)
    kept = [part for images, valid in swept for part in images.index[:valid]]
    assert kept == list(range(10))
    last, valid = swept[-1]
    for row in range(valid, size):
        np.testing.assert_array_equal(last.canvas[row], last.canvas[valid - 1])
        assert last.index[row] == 9


def test_errors_of_the_source_reach_the_caller(source, monkeypatch):
    def load(self, row):
        raise UserError("image 3 is locked")

    monkeypatch.setattr(synthetic.Synthetic, "load", load)
    with pytest.raises(UserError, match="image 3 is locked"):
        next(batches(source, batch_size=4, steps=2, seed=0))


class Trajectories(eqx.Module):
    """A batch that is none of images."""

    states: np.ndarray
    actions: np.ndarray
    index: np.ndarray


class Toy(Source):
    """Five-step sequences of vectors with an action between steps; row 7 is corrupt."""

    fingerprint: ClassVar = {"toy": "20 sequences"}

    def __len__(self):
        return 20

    def load(self, row):
        if row == 7:
            raise CorruptExampleError("row 7 has no end")
        states, actions = np.random.default_rng(row).standard_normal((2, 5, 3), dtype=np.float32)
        return {"states": states, "actions": actions[:-1]}

    def collate(self, examples, index):
        states, actions = zip(*((one["states"], one["actions"]) for one in examples), strict=True)
        return Trajectories(np.stack(states), np.stack(actions), index)


@pytest.mark.parametrize(
    "reading", [{"num_threads": 0}, {"num_threads": 1}, {"num_threads": 2}, {"num_threads": 1, "num_workers": 2}]
)
def test_a_source_of_sequences_with_actions_needs_nothing_of_images(reading):
    found, toy = [], Toy()
    stream = list(batches(toy, batch_size=8, steps=5, seed=3, on_corrupt=lambda rows: found.extend(rows), **reading))
    assert indices(stream) == list(range(40))  # the position in the run, over epochs and steps
    rows = [int(epoch_permutation(20, 3, epoch)[place]) for epoch in range(2) for place in range(20)]
    expected = [toy.load(8 if row == 7 else row) for row in rows]  # the next row in place of the corrupt one
    for name in ("states", "actions"):
        seen = np.concatenate([getattr(batch, name) for batch in stream])
        np.testing.assert_array_equal(seen, np.stack([one[name] for one in expected]))
    assert found == [7, 7] and all(type(batch) is Trajectories for batch in stream)

    sizes = {"batch_size": 8, "steps": 5, "seed": 3, "process_count": 2, "on_corrupt": lambda rows: None}
    halves = [list(batches(toy, process_index=process, **sizes)) for process in range(2)]
    for batch, *parts in zip(stream, *halves, strict=True):
        np.testing.assert_array_equal(batch.states, np.concatenate([part.states for part in parts]))


def test_every_sequence_comes_once():
    swept = list(iter_once(Toy(), 8, on_corrupt=lambda rows: None))
    assert [row for batch, valid in swept for row in batch.index[:valid].tolist()] == list(range(20))
    assert all(batch.actions.shape == (8, 4, 3) for batch, _ in swept)


def test_where_no_replacement_can_be_read_either_all_are_named():
    class Lost(Toy):
        def load(self, row):
            raise CorruptExampleError(f"row {row} is gone")

    with pytest.raises(CorruptExampleError, match=r"row \d+ is gone\nNor could what was tried in its place: row"):
        next(batches(Lost(), batch_size=2, steps=1, seed=0))
