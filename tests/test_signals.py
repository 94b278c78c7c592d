"""The first signal asks, the second ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from jepax.distributed import preemption


@pytest.mark.parametrize("number", signals.ASKED)
def test_deferred_until_it_is_looked_at(number):
    reached = []
    with pytest.raises(KeyboardInterrupt), preemption.defer():
        assert not preemption.stop_requested()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert preemption.stop_requested()
        reached.append(True)
    assert reached and not preemption.stop_requested()


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in signals.ASKED]
    with preemption.install_handlers(), preemption.defer():
        assert [signal.getsignal(number) for number in signals.ASKED] != before
    assert [signal.getsignal(number) for number in signals.ASKED] == before


def test_at_once_where_nothing_is_deferred():
    with pytest.raises(KeyboardInterrupt), preemption.install_handlers():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_in_a_thread_it_does_nothing():
    import threading

    found = []

    def inside():
        with preemption.defer():
            found.append(preemption.stop_requested())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]


SLEEP = """
import hashlib, time
from jepax.distributed import preemption
with preemption.defer():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8) if {deaf} else time.sleep(60)
"""


@pytest.mark.parametrize("deaf", [False, True])
def test_the_second_signal_ends_the_process_at_once(deaf):
    """Also where the main thread is in a call that hears no signal, as a compilation does not."""
    code = SLEEP.format(deaf=deaf)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        try:
            assert process.wait(10) == 128 + signal.SIGTERM
        finally:
            process.kill()
        assert b"saving after this step" in process.stderr.read()
