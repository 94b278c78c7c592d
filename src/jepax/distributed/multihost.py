"""Several processes that train one run: startup, values exchanged, errors shared.

JAX's coordination service watches the processes. If one dies or hangs, the service ends the others with a non-zero exit
code, and the same command resumes from the newest checkpoint. In a run of one process everything here costs nothing.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from jepax.distributed.preemption import EXIT_RETRY, Preempted
from jepax.errors import UserError, user_message

HEARTBEAT_S = 60
"""Seconds without a heartbeat after which a process counts as lost; `JEPAX_HEARTBEAT_SECONDS` overrides it."""
SHUTDOWN_S = 30
"""Seconds that `shutdown` waits for a process that has passed the barrier before it."""
ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PEER_LOST = "a peer process was lost; the same command on all hosts resumes from the newest checkpoint"
PEER_ERRORS = ("gloo", "nccl", "connection", "socket", "unavailable", "deadline_exceeded", "coordination", "barrier")
"""Words in the errors that JAX and Orbax raise if another process does not answer."""


class PeerLostError(RuntimeError):
    """Another process of the run is gone or hangs; no collective can succeed."""


class CollectiveError(UserError):
    """A user error of at least one process that every process raises at the same point."""


def initialize(timeout_s: int = 300) -> None:
    """Connect to the run's other processes; call it before anything touches a device.

    Reads `ENV_VARS` if they are set; otherwise JAX detects Slurm, Open MPI, Kubernetes and Cloud TPU. JAX aborts the
    process if the others do not connect within `timeout_s` seconds. Raises `UserError` if nothing describes them.
    """
    config = env_config(os.environ)
    heartbeat_s = _env_int(os.environ, "JEPAX_HEARTBEAT_SECONDS", HEARTBEAT_S)
    jax.config.update("jax_enable_preemption_service", False)  # it would replace our SIGTERM handler
    try:
        jax.distributed.initialize(
            **config,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"this process did not find the others of its run: {str(error).splitlines()[0]}\n"
            f"set {', '.join(ENV_VARS)}, or start all of them by srun, mpirun or an indexed Kubernetes job"
        ) from error


def env_config(environ: Mapping[str, str]) -> dict[str, str | int]:
    """Arguments of `jax.distributed.initialize` from `ENV_VARS`; none if JAX should detect them. Raises `UserError`."""
    address, *numbers = ENV_VARS
    given = [name for name in numbers if name in environ]
    if not given:
        return {}
    if missing := [name for name in ENV_VARS if name not in environ]:
        raise UserError(f"{given[0]} is set and {missing[0]} is not; set {', '.join(ENV_VARS)}, or none of them")
    count, index = (_env_int(environ, name) for name in numbers)
    if index >= count:
        raise UserError(f"JAX_PROCESS_ID={index} is not below JAX_NUM_PROCESSES={count}; count from 0")
    return {"coordinator_address": environ[address], "num_processes": count, "process_id": index}


def _env_int(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    value = environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value} is no whole number")
    return int(value)


def shutdown() -> None:
    """Disconnect from the other processes once all have called it; each may then continue alone or end."""
    if jax.distributed.is_initialized():
        all_gather_str("")  # a barrier without a time limit: the main process may still be writing
        jax.distributed.shutdown()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    """True in the process that writes the run's files."""
    return jax.process_index() == 0


def all_gather_str(text: str) -> list[str]:
    """Return the text of every process, by process index. Every process must call it at the same point.

    Waits for the slowest process, so it also serves as a barrier. Raises `PeerLostError`.
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    with translate_peer_errors():
        sizes = multihost_utils.process_allgather(np.int32(data.size))  # (processes,)
        width = 1 << int(sizes.max()).bit_length()  # a power of two, so that few programs are compiled
        rows = multihost_utils.process_allgather(np.pad(data, (0, width - data.size)))  # (processes, width)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def broadcast(value: int) -> int:
    """Return the value of process 0. Every process must call it."""
    with translate_peer_errors():
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextmanager
def collective_errors() -> Iterator[None]:
    """Barrier at exit. If any process raised a user error, every process raises one: `CollectiveError`.

    The body must not wait for other processes after the point at which one of them can fail.
    """
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
    messages = all_gather_str((user_message(error) or type(error).__name__) if error else "")
    if error is not None and len(messages) == 1:
        raise error
    if error is not None:
        raise CollectiveError(messages[jax.process_index()]) from error
    for process, message in enumerate(messages):
        if message:
            raise CollectiveError(f"process {process}: {message}")


class CollectiveFlag:
    """Combines flags, such as "stop", over all processes: each is true if it is true in any, after the same step.

    Call it once per step, after the step is dispatched, with the same number of flags each time. It returns the result
    of the call before, which the device has finished by then, so nothing waits. One process gets its own flags at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda flags: jnp.any(flags, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: Bool[Array, "flags"] | None = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        if jax.process_count() == 1:
            return flags
        local = np.tile(np.array(flags), (jax.local_device_count(), 1))  # (local devices, flags)
        ready, self._pending = self._pending, self._any(jax.make_array_from_process_local_data(self._sharding, local))
        return (False,) * len(flags) if ready is None else tuple(np.asarray(ready).tolist())


@contextmanager
def peer_guard() -> Iterator[None]:
    """Wrap everything that the processes do together, so that none of them waits for one that failed.

    Errors that all processes raise (`Preempted`, `CollectiveError`) pass after a barrier. A lost peer ends this process
    with code `EXIT_RETRY`, a user error with 2; the others then lose a peer.
    """
    try:
        with translate_peer_errors():
            yield
    except (Preempted, CollectiveError):
        shutdown()
        raise
    except Exception as error:
        lost = isinstance(error, PeerLostError)
        message = str(error) if lost else user_message(error)
        if message is None or not jax.distributed.is_initialized():
            raise
        # Not by `sys.exit`: JAX would wait there for the other processes, and then abort with code 134.
        print(f"jepax: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_RETRY if lost else 2)


@contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Raise `PeerLostError` in place of JAX's and Orbax's errors about other processes."""
    try:
        yield
    except (RuntimeError, ValueError, TimeoutError) as error:  # Orbax raises the last two
        is_reported = jax.process_count() > 1 and any(word in str(error).lower() for word in PEER_ERRORS)
        if isinstance(error, (UserError, PeerLostError)) or not is_reported:
            raise
        raise PeerLostError(f"{PEER_LOST}\n{str(error).splitlines()[0]}") from error
