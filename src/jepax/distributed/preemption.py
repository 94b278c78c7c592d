"""SIGTERM and SIGINT: the first requests an orderly end, the second ends the process at once."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_RETRY = 75
"""Exit code of a command that stopped early and resumes if it is run again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """Training stopped on request; the same command resumes."""


class _SignalState:
    stop = deferred = False


def stop_requested() -> bool:
    """True after the first signal."""
    return _SignalState.stop


def _on_signal(number: int, frame: object) -> None:
    first, _SignalState.stop = not _SignalState.stop, True
    if first and not _SignalState.deferred:
        raise KeyboardInterrupt


def _watch(wakeup: socket.socket) -> None:
    """Run in a thread, since the main thread handles no signal while it compiles or waits for a device."""
    count = 0
    while data := wakeup.recv(1):  # the number of a signal
        count += data[0] in SIGNALS
        if count == 1 and data[0] in SIGNALS and _SignalState.deferred:
            print("jepax: saving after this step, then ending; again: ends at once", file=sys.stderr, flush=True)
        if count == 2:
            print("jepax: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + data[0])


@contextmanager
def install_handlers() -> Iterator[None]:
    """Make the first signal raise KeyboardInterrupt, or set a flag inside `defer`, and the second end the process.

    Does nothing outside the main thread and inside itself.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _on_signal:
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as `set_wakeup_fd` requires
    _SignalState.stop = False
    handlers = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_fd)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()  # ends the watcher
        watcher.join()
        reader.close()
        _SignalState.stop = False


@contextmanager
def defer() -> Iterator[None]:
    """Make the first signal only set `stop_requested`. KeyboardInterrupt follows at the end if nobody acted on it."""
    with install_handlers():
        before, _SignalState.deferred = _SignalState.deferred, True
        try:
            yield
        finally:
            _SignalState.deferred = before
        if stop_requested() and not before:
            raise KeyboardInterrupt
