"""Batches by step: the step's number, not an iterator's state, determines a batch's examples."""

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from functools import partial

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int, Int32

from jepax.data.sources import Batch, Source
from jepax.types import UserError

OnCorrupt = Callable[[Int[np.ndarray, " replaced"]], None]
"""Called with the source's rows that were corrupt and replaced in the next batch."""
Read = tuple[Batch, list[int]]
"""A batch, and its rows that were corrupt and replaced."""


def batches(
    source: Source,
    *,
    batch_size: int,
    steps: int,
    start: int = 0,
    seed: int,
    num_threads: int = 2,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    on_corrupt: OnCorrupt | None = None,
) -> Generator[Batch, None, None]:
    """Yields this process's slices of the batches of steps `start` .. `steps - 1`, as numpy arrays.

    The order concatenates a new permutation of the source per epoch; step s has the positions from s * batch_size on
    (`batch_size` counts all processes), so a batch may span two epochs. Process p gets the p-th contiguous slice. The
    batches do not depend on the start or on the number of threads, workers and processes.
    A batch's `index` is the position modulo 2^31.

    A corrupt example is replaced (`Source.load_batch`), and `on_corrupt` is called with such rows before their batch
    is yielded: in the caller's thread, in the order of steps, every time. Without it a warning names the first one.

    `num_workers` > 0 reads in that many processes, each with `num_threads` threads. Close the iterator (or exhaust it)
    to end them. Raises `UserError` for inconsistent sizes, and what the source and `on_corrupt` raise.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size={batch_size} is not a positive multiple of the {process_count} processes.")
    local = batch_size // process_count
    read = partial(_read_step, source, seed, batch_size, process_index * local, local)
    return _to_batches(_prefetch(read, start, steps, num_threads, num_workers), source, on_corrupt)


def iter_once(
    source: Source, batch_size: int, num_threads: int = 2, num_workers: int = 0, on_corrupt: OnCorrupt | None = None
) -> Iterator[tuple[Batch, int]]:
    """Yields every example once, in the source's order, with the number of valid rows in each batch.

    The last batch is padded with copies of its last row, so that shapes never change. A batch's `index` is the row.
    Corrupt examples are treated as by `batches`.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is below 1.")
    read = partial(_read_in_order, source, batch_size)
    reads = _prefetch(read, 0, -(-len(source) // batch_size), num_threads, num_workers)
    for step, batch in enumerate(_to_batches(reads, source, on_corrupt)):
        yield batch, min(batch_size, len(source) - step * batch_size)


def _read_step(source: Source, seed: int, batch_size: int, offset: int, local: int, step: int) -> Read:
    """Reads one process's slice of a training step."""
    positions = step * batch_size + offset + np.arange(local)

    # Each epoch has its own permutation, and a batch may span two of them.
    epochs, places = np.divmod(positions, len(source))
    rows = np.empty(local, np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = epoch_permutation(len(source), seed, int(epoch))[places[here]]
    batch, replaced = source.load_batch(rows, (positions % 2**31).astype(np.int32))
    return batch, rows[replaced].tolist()


def _read_in_order(source: Source, batch_size: int, step: int) -> Read:
    first = step * batch_size
    rows = np.arange(first, min(first + batch_size, len(source)), dtype=np.int32)
    batch, replaced = source.load_batch(rows)
    if len(rows) < batch_size:
        padded = np.minimum(np.arange(batch_size), len(rows) - 1)
        batch = jax.tree.map(lambda x: x[padded], batch)
    return batch, rows[replaced].tolist()


@functools.lru_cache(maxsize=4)
def epoch_permutation(examples: int, seed: int, epoch: int) -> Int32[np.ndarray, " examples"]:
    """Returns the order of one epoch, the same on every machine and NumPy release (raw Philox words, sorted).

    Not Grain's `shuffle`: its four-round index shuffle keeps structure (of 60,000 rows, those 256 positions apart
    correlate at about 0.6, so successive batches resemble each other), and its epoch e of seed s is epoch 0 of s + e.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(examples)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.setflags(write=False)  # all threads share it through the cache
    return order


def _to_batches(
    reads: Generator[Read, None, None], source: Source, on_corrupt: OnCorrupt | None
) -> Generator[Batch, None, None]:
    warned = False
    with contextlib.closing(reads):
        for batch, replaced in reads:
            if replaced and on_corrupt is not None:
                on_corrupt(np.array(replaced))
            elif replaced and not warned:
                warned = True
                name = source.display_name(replaced[0])
                warnings.warn(f"{name} cannot be read and is replaced, as are others that cannot.", stacklevel=2)
            # asarray: workers send a subclass, and the view keeps its shared memory alive.
            yield jax.tree.map(np.asarray, batch)


def _prefetch(
    read: Callable[[int], Read], start: int, stop: int, num_threads: int, num_workers: int
) -> Generator[Read, None, None]:
    """Yields read(start) .. read(stop - 1), computed ahead of use; at most `num_threads` + 1 are queued per process."""
    if start >= stop:
        return
    data = grain.MapDataset.range(start, stop).map(read)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags, which nothing parses here
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        data = data.mp_prefetch(processes, worker_init_fn=_exit_with_parent)
    iterator = iter(data)
    try:
        yield from iterator
    except RuntimeError as error:
        if dead := _dead_worker(error, num_workers):
            raise dead from error
        raise
    finally:  # also when the caller stops early: ends the workers and frees their shared memory
        iterator.close()


def _dead_worker(error: RuntimeError, num_workers: int) -> UserError | None:
    """Returns an error if one of Grain's processes died, which Grain notices within two seconds."""
    found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if found is None:
        return None
    code = int(found[1])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return UserError(
        f"one of the data.num_workers={num_workers} processes that read the data {how}, often because memory ran out;\n"
        "lower data.num_workers, or set 0 to read in threads; rerun the same command to resume"
    )


def _exit_with_parent(worker: int, workers: int) -> None:
    """Ends this worker process when its parent is gone; otherwise workers of a killed run would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
