"""Several processes as one run: how they find each other, agree, stop after the same step, and end when one is lost.

Everything here also works in a run of one process, where it costs nothing.
"""

import atexit
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from jepax.signals import AGAIN, Stopped
from jepax.types import UserError, words

HEARTBEAT = 60
"""Seconds without a sign of life after which a process counts as lost, unless `JEPAX_HEARTBEAT_SECONDS` says more."""
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MESSAGE = "a peer process was lost; the same command on all hosts goes on from the newest checkpoint"
SIGNS = ("gloo", "nccl", "connection", "socket", "unavailable", "deadline_exceeded", "coordination", "barrier")
"""Words of the errors by which the runtime says that another process does not answer."""
FAILED = "jepax/failed"
"""Key under which a process that fails tells the others why, and the barrier at which all wait to end with it."""
LAST_WAIT = 10
"""Seconds that a process which fails waits for the others to hear of it."""
_kept: list[object] = []  # handlers given to C, which holds only their addresses
_numbers = itertools.count()
_shared: BaseException | None = None  # what `together` raises: no other process has to be told
_over = threading.Event()
_listener: threading.Thread | None = None
_failing = threading.Lock()  # taken for ever by the first reason for which this process ends with 2


class PeerLost(RuntimeError):
    """Another process of the run is gone or hangs; nothing that needs all processes can go on."""


def start(heartbeat: int | None = None, wait: int = 300) -> None:
    """Joins the run's other processes; call it before anything touches a device.

    Reads the three variables of `BY_HAND` where they are set, and else leaves it to JAX, which knows Slurm, Open MPI,
    Kubernetes and Cloud TPU. `heartbeat`: seconds, see `HEARTBEAT`; `wait`: seconds until all have to be there.

    Raises `UserError` where the variables make no sense or nothing says who the others are. Where they do not come in
    time, JAX's runtime aborts the process: that is turned into a line and the exit code `AGAIN`.
    """
    heartbeat = heartbeat or _whole(os.environ, "JEPAX_HEARTBEAT_SECONDS", HEARTBEAT)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    help = f"set {', '.join(BY_HAND)}, or start all of them by srun, mpirun or an indexed Kubernetes job"
    _at_abort(lambda _: _end(f"this process did not find the others of its run within {wait} s;\n{help}"))
    try:
        jax.distributed.initialize(
            **by_hand(os.environ), heartbeat_timeout_seconds=heartbeat, initialization_timeout=wait
        )
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"this process did not find the others of its run: {reason}\n{help}") from error
    _end_at_abort()
    _hear()
    atexit.register(_part)


def by_hand(environment: Mapping[str, str]) -> dict[str, str | int]:
    """What `jax.distributed.initialize` is to be told, from all of `BY_HAND` or from none. Raises `UserError`."""
    given = [name for name in BY_HAND[1:] if name in environment]
    if not given:
        return {}
    if missing := [name for name in BY_HAND if name not in environment]:
        raise UserError(f"{given[0]} is set and {missing[0]} is not; set {', '.join(BY_HAND)}, or none of them")
    count, mine = (_whole(environment, name) for name in BY_HAND[1:])
    if not mine < count:
        raise UserError(f"JAX_PROCESS_ID={mine} is not below JAX_NUM_PROCESSES={count}; count from 0")
    return {"coordinator_address": environment[BY_HAND[0]], "num_processes": count, "process_id": mine}


def _whole(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value} is no whole number")
    return int(value)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first() -> bool:
    """Whether this process is the one that writes the run's files."""
    return jax.process_index() == 0


def exchange(mine: str) -> list[str]:
    """The text of every process, in their order. All have to call it, at the same place of the program.

    Waits for the slowest for as long as every process lives. Raises `PeerLost`.
    """
    if jax.process_count() == 1:
        return [mine]
    place = f"jepax/{next(_numbers)}"
    with lost_peers():
        client = _state().client
        client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(mine))
        return [json.loads(_wait_for(client, f"{place}/{i}")) for i in range(jax.process_count())]


def _wait_for(client: Any, key: str, over: Callable[[], bool] = lambda: False) -> str:
    """The value of a key, once it is there, or nothing once it is over; in short waits, between which Python sees
    signals such as Ctrl-C."""
    while not over():
        try:
            return client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    return ""


def same(value: int) -> int:
    """The value that process 0 has. All have to call it."""
    return json.loads(exchange(json.dumps(value))[0])


@contextmanager
def together() -> Iterator[None]:
    """What all processes do at once: at its end they wait for each other, and an error of one that is the user's to
    mend is an error of all: its own there, a `UserError` in the others.

    Where one fails, the others must come to the end without it: `exchange` within is for before anything can fail.
    """
    global _shared
    failed: Exception | None = None
    try:
        yield
    except (UserError, OSError) as error:
        failed = error
    texts = exchange(words(failed) or "" if failed else "")
    if failed is None and any(texts):
        process = next(process for process, text in enumerate(texts) if text)
        failed = UserError(f"process {process}: {texts[process]}")
    if failed is not None:
        _shared = failed if len(texts) > 1 else None
        raise failed


class Agreement:
    """Whether any process has a wish, such as to stop: the same answer, after the same step, in all of them.

    Call it once per step, after the step was dispatched, with as many wishes each time. The answers come with the next
    call, when the device has them anyway: nothing waits. In a run of one process the wishes are the answers.
    """

    def __init__(self, mesh: Mesh) -> None:
        whole = NamedSharding(mesh, PartitionSpec())
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda wishes: jnp.any(wishes, axis=0), out_shardings=whole)
        self._answers: Bool[Array, "wishes"] | None = None

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        if jax.process_count() == 1:
            return wishes
        mine = np.tile(np.array(wishes), (jax.local_device_count(), 1))
        before, self._answers = self._answers, self._any(jax.make_array_from_process_local_data(self._flags, mine))
        return (False,) * len(wishes) if before is None else tuple(np.asarray(before).tolist())


def is_lost(error: BaseException) -> bool:
    """Whether an error of the runtime says that another process does not answer."""
    text = str(error).lower()
    return jax.process_count() > 1 and any(sign in text for sign in SIGNS)


@contextmanager
def lost_peers() -> Iterator[None]:
    """Within, the runtime's errors about other processes are `PeerLost`."""
    try:
        yield
    except (RuntimeError, ValueError, TimeoutError) as error:  # Orbax raises the latter two
        if isinstance(error, (UserError, PeerLost)) or not is_lost(error):
            raise
        raise PeerLost(f"{MESSAGE}\n{str(error).splitlines()[0]}") from error


@contextmanager
def peers() -> Iterator[None]:
    """Around all that the processes do together: the loss of a peer ends this one with `AGAIN` and a line that says so,
    an error of one that is the user's to mend ends all of them with 2 and its message, and when they are asked to end
    they wait for each other first.

    The ends by an error come at once, without Python's exit: that would wait for the lost process, too.
    """
    try:
        with lost_peers():
            try:
                yield
            except Stopped:
                leave()
                raise
    except PeerLost as error:
        sys.stdout.flush()
        _end(str(error))
    except Exception as error:
        if (said := words(error)) is None or _state().client is None:
            raise
        sys.stdout.flush()
        _fail(said, "" if error is _shared else f"process {jax.process_index()}: {said}")


def leave() -> None:
    """Ends what the processes do together, when all have come here; each may then go on alone or end."""
    if jax.process_count() > 1:
        exchange("")
        _hear_no_more()
        jax.distributed.shutdown()
        _at_abort(None)


def _hear() -> None:
    """Begins to listen, in a thread, for a process that fails: the main one may wait for it in a collective."""
    global _listener
    client = _state().client

    def listen() -> None:
        with suppress(jax.errors.JaxRuntimeError):  # no connection any more: the runtime tells the process
            if said := _wait_for(client, FAILED, _over.is_set):
                _fail(said)

    _listener = threading.Thread(target=listen, name="peers", daemon=True)
    _listener.start()


def _hear_no_more() -> None:
    """To be called before Python or the connection ends, which a thread that waits in the runtime does not survive."""
    _over.set()
    if _listener is not None:
        _listener.join()


def _fail(said: str, tell: str = "") -> NoReturn:
    """Ends this process with 2 and this message, and by what it tells them the others, which are in here then, too.

    They end at the same time: `srun --kill-on-bad-exit` signals those that are left behind, whose code would be 143.
    """
    _failing.acquire()
    os.write(2, f"jepax: {said}\n".encode())
    client = _state().client
    try:
        if tell:
            with suppress(jax.errors.JaxRuntimeError):  # another process was first
                client.key_value_set(FAILED, tell)
        client.wait_at_barrier(FAILED, 1000 * LAST_WAIT)
    finally:
        os._exit(2)


def _part() -> None:
    """At the exit of a process that has not come to `leave`: it failed, and JAX's exit would wait for the others."""
    _hear_no_more()
    state = _state()
    for each in (state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))  # its destructor would wait, too
    state.client = state.service = None


def _state() -> Any:
    """JAX's own: it has no public way to the store of keys and values that all processes share."""
    from jax._src.distributed import global_state

    return global_state


def _end(message: str) -> NoReturn:
    if _failing.locked():  # it waits for the others, of which one is gone, by a thread that may be this one
        os._exit(2)
    os.write(2, f"jepax: {message}\n".encode())
    os._exit(AGAIN)


def _end_at_abort() -> None:
    """Turns the abort by which JAX's runtime ends a process whose peers are lost into our line and exit code.

    The abort comes from a thread of the runtime, while this one may be blocked in a collective, so a handler of
    Python's `signal` would never run. An abort in one of Python's own threads is none of ours: it stays what it is.
    """

    def handler(_: int) -> None:
        if threading.get_ident() not in {thread.ident for thread in threading.enumerate()}:
            _end(MESSAGE)

    _at_abort(handler)


def _at_abort(handler: Callable[[int], None] | None) -> None:
    """What a thread that aborts the process calls first; None: nothing."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _kept.append(kind(handler) if handler else kind())
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, kind), ctypes.c_void_p
    set_handler(signal.SIGABRT, _kept[-1])
