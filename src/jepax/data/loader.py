"""Batches by step: the step's number, not an iterator's state, says which examples a batch holds."""

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, Int32

from jepax.data.broken import warner
from jepax.data.sources import Source
from jepax.types import Images, UserError

Parts = tuple[np.ndarray, ...]
"""What crosses from a worker process: canvas, size, index, label, and `lost`.

`lost`, Int32[batch], holds the row of the source of each picture that another stands in for, and -1 elsewhere.
"""
NONE = np.int32(-1)
Broken = Callable[[Int[np.ndarray, " replaced"]], None]
"""Is told the rows of the source whose pictures could not be read, and were replaced in the batch handed over next."""


def batches(
    source: Source,
    *,
    batch_size: int,
    steps: int,
    start: int = 0,
    seed: int,
    threads: int = 2,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    broken: Broken | None = None,
) -> Generator[Images, None, None]:
    """This process's slices of the batches of steps `start` .. `steps - 1`, as numpy arrays.

    The order is a fresh permutation of the source each epoch, laid end to end; step s holds its positions
    s * batch_size onwards (`batch_size` counts all processes), so two epochs may meet within a batch. Process p takes
    the p-th contiguous slice. Nothing else enters: any start, threads, workers and processes give the same batches.
    `Images.index` is the position modulo 2^31.

    A picture that cannot be read is replaced as `Source.load_readable` says, and `broken` is called with the rows of
    such pictures before their batch is handed over: in the caller's thread, in the order of steps, at every meeting of
    theirs. Left out, a warning names the first one.

    `workers` > 0 reads in that many processes, each with `threads` threads. Close the iterator (or exhaust it) to end
    them. Errors: UserError for sizes that do not fit together; what the source and `broken` raise.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size={batch_size} is no positive multiple of the {process_count} processes.")
    share = batch_size // process_count
    reader = _TrainStep(source, batch_size, process_index * share, share, seed)
    return _handed_over(_read_ahead(reader, start, steps, threads, workers), broken or warner(source))


def sweep(
    source: Source, batch_size: int, threads: int = 2, workers: int = 0, broken: Broken | None = None
) -> Iterator[tuple[Images, int]]:
    """Every example once, in the source's order, with the number of valid rows in each batch.

    The last batch is filled up with copies of its last row, so that shapes never change. `Images.index` is the row.
    Pictures that cannot be read are replaced, and `broken` is told of them, as in `batches`.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is below 1.")
    parts = _read_ahead(_SweepStep(source, batch_size), 0, -(-len(source) // batch_size), threads, workers)
    for step, images in enumerate(_handed_over(parts, broken or warner(source))):
        yield images, min(batch_size, len(source) - step * batch_size)


def _handed_over(read: Generator[Parts, None, None], broken: Broken) -> Generator[Images, None, None]:
    with contextlib.closing(read):
        for parts in read:
            # asarray: from workers Grain hands a subclass over; the view keeps its shared memory for as long as needed.
            canvas, size, index, label, lost = map(np.asarray, parts)
            if (lost >= 0).any():
                broken(lost[lost >= 0])
            yield Images(canvas, size, index, label)


@functools.lru_cache(maxsize=4)
def epoch_order(examples: int, seed: int, epoch: int) -> Int32[np.ndarray, " examples"]:
    """The permutation of one epoch, the same on every machine and NumPy release (raw Philox words, sorted).

    Not Grain's `shuffle`: its four-round index shuffle keeps structure (of 60,000 rows, those 256 positions apart
    correlate at about 0.6, so successive batches resemble each other), and its epoch e of seed s is epoch 0 of s + e.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(examples)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.setflags(write=False)  # shared by all threads through the cache
    return order


@dataclass(frozen=True)
class _TrainStep:
    """Reads one process's slice of a step; a picklable value, so that worker processes can hold it."""

    source: Source
    batch_size: int
    offset: int
    share: int
    seed: int

    def __call__(self, step: int) -> Parts:
        first = step * self.batch_size + self.offset
        positions = np.arange(first, first + self.share)
        rows = self.rows(positions)
        canvas, size, label, replaced = self.source.load_readable(rows)
        return canvas, size, (positions % 2**31).astype(np.int32), label, np.where(replaced, rows, NONE)

    def rows(self, positions: Int[np.ndarray, " batch"]) -> Int32[np.ndarray, " batch"]:
        epochs, places = np.divmod(positions, len(self.source))
        rows = np.empty(len(positions), np.int32)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = epoch_order(len(self.source), self.seed, int(epoch))[places[here]]
        return rows


@dataclass(frozen=True)
class _SweepStep:
    source: Source
    batch_size: int

    def __call__(self, step: int) -> Parts:
        first = step * self.batch_size
        rows = np.minimum(np.arange(first, first + self.batch_size), len(self.source) - 1).astype(np.int32)
        fresh = rows[: len(self.source) - first]
        *parts, replaced = self.source.load_readable(fresh)
        lost = np.full(self.batch_size, NONE)
        lost[: len(fresh)][replaced] = fresh[replaced]
        canvas, size, label = (part[rows - first] for part in parts) if len(fresh) < len(rows) else parts
        return canvas, size, rows, label, lost


def _read_ahead(
    read: Callable[[int], Parts], start: int, stop: int, threads: int, workers: int
) -> Generator[Parts, None, None]:
    """read(start) .. read(stop - 1), in order, computed ahead of their use. At most `threads` + 1 wait per process."""
    if start >= stop:
        return
    data = grain.MapDataset.range(start, stop).map(read)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags, which no one parses here
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        data = data.mp_prefetch(processes, worker_init_fn=_leave_with_parent)
    iterator = iter(data)
    try:
        yield from iterator
    except RuntimeError as error:
        if said := _lost_worker(error, workers):
            raise said from error
        raise
    finally:  # also when the caller stops early: ends the workers and frees their shared memory
        iterator.close()


def _lost_worker(error: RuntimeError, workers: int) -> UserError | None:
    """What to say where Grain found one of its processes dead, which it does within two seconds."""
    found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if found is None:
        return None
    code = int(found[1])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return UserError(
        f"one of the data.workers={workers} processes that read the data {how}, often because memory ran out;\n"
        "lower data.workers, or set 0 to read in threads; the same command goes on from the newest checkpoint"
    )


def _leave_with_parent(worker: int, workers: int) -> None:
    """Ends this worker process when its parent is gone: left alone, workers of a killed run wait on for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
