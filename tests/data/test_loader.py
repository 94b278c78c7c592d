"""The order of examples is a function of seed and position, whatever reads them."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from jepax.data import batches, sweep
from jepax.data.loader import epoch_order
from jepax.data.sources import synthetic
from jepax.types import UserError


@pytest.fixture
def source():
    return synthetic.open_split("train", images=10, canvas_shape=(4, 4, 1))


def rows_seen(source, stream):
    """Row of each example, recovered from its pixels."""
    canvas, _, _ = source.load(np.arange(len(source)))
    known = {picture.tobytes(): row for row, picture in enumerate(canvas)}
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
    orders = {epoch_order(50, seed, epoch).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_order_keeps_no_structure():
    order = epoch_order(60_000, 0, 0).astype(float)
    for lag in (1, 2, 16, 256):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(60_000)


def test_order_is_written_in_stone():
    assert epoch_order(12, 0, 0).tolist() == STONE
    assert not epoch_order(12, 0, 0).flags.writeable


STONE = [0, 8, 9, 3, 7, 5, 1, 11, 2, 10, 6, 4]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 3])
def test_start_and_threads_change_nothing(source, threads, start):
    whole = list(batches(source, batch_size=4, steps=6, seed=1))
    part = list(batches(source, batch_size=4, steps=6, seed=1, start=start, threads=threads))
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
    stream = batches(source, batch_size=4, steps=500, seed=1, start=1, threads=1, workers=2)
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
    swept = list(sweep(source, size))
    assert all(images.canvas.shape == (size, 4, 4, 1) for images, _ in swept)
    kept = [part for images, valid in swept for part in images.index[:valid]]
    assert kept == list(range(10))
    last, valid = swept[-1]
    for row in range(valid, size):
        np.testing.assert_array_equal(last.canvas[row], last.canvas[valid - 1])
        assert last.index[row] == 9


def test_errors_of_the_source_reach_the_caller(source, monkeypatch):
    def load(self, rows):
        raise UserError("picture 3 is broken")

    monkeypatch.setattr(synthetic.Synthetic, "load", load)
    with pytest.raises(UserError, match="picture 3 is broken"):
        next(batches(source, batch_size=4, steps=2, seed=0))
