"""SIGTERM and SIGINT: the first asks the process to end in order, the second ends it at once."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = 75
"""Exit code of a command that was asked to end and would go on when run again (EX_TEMPFAIL in sysexits.h)."""
ASKED = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Training ended because it was asked to; the same command goes on."""


class _Asked:
    """What this process was asked."""

    number: int | None = None
    deferring = False


def asked() -> bool:
    """Whether the process was asked to end."""
    return _Asked.number is not None


def _handle(number: int, frame: object) -> None:
    first, _Asked.number = _Asked.number is None, number
    if first and not _Asked.deferring:
        raise KeyboardInterrupt


def _watch(wakeups: socket.socket) -> None:
    """Runs in a thread of its own, since the main thread hears nothing while it compiles or waits for a device."""
    heard = 0
    while numbers := wakeups.recv(64):
        for number in numbers:
            if number not in ASKED:
                continue
            heard += 1
            name = signal.Signals(number).name
            if heard > 1:
                print(f"jepax: {name} again: ended at once", file=sys.stderr, flush=True)
                os._exit(128 + number)
            if _Asked.deferring:
                said = f"jepax: {name}: saving after this step, then ending; again: ends at once"
                print(said, file=sys.stderr, flush=True)


@contextmanager
def handled() -> Iterator[None]:
    """Within, the first signal raises KeyboardInterrupt, or is `deferred`; the second ends the process at once.

    In a thread other than the main one, and inside itself, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _handle:
        yield
        return
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    _Asked.number = None
    before = {number: signal.signal(number, _handle) for number in ASKED}
    old = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(hears,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        tells.close()  # which ends the thread
        thread.join()
        hears.close()
        _Asked.number = None


@contextmanager
def deferred() -> Iterator[None]:
    """Within, the first signal only makes `asked` true; it raises KeyboardInterrupt after the end, if need be."""
    with handled():
        before, _Asked.deferring = _Asked.deferring, True
        try:
            yield
        finally:
            _Asked.deferring = before
        if asked() and not before:
            raise KeyboardInterrupt
