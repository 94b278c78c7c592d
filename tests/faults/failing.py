"""Processes of which one or all end in some way, with code and message as the command line has them, while the others
wait: python -m tests.faults.failing HOW PROCESS.
"""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jepax.cli import exit_with
from jepax.distributed import multihost, preemption, sharding
from jepax.errors import UserError, user_message

FULL = OSError(28, "No space left on device", "a/file")


def wait_on_the_device() -> None:
    """For what the failing process never brings."""
    mesh = sharding.make_mesh()
    parts = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    mine = jax.make_array_from_process_local_data(parts, np.ones((1, 4), np.float32))
    jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(mine).block_until_ready()


def end(how: str, process: int) -> None:
    failing = jax.process_index() == process
    if how == "stuck" and jax.process_index() == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "stuck":
        time.sleep(1)
    if how in ("alone", "stuck"):
        if failing:
            raise UserError("no pictures here")
        wait_on_the_device()
    if how == "system":
        if failing:
            raise FULL
        multihost.all_gather_str("")
    if how == "together":
        with multihost.collective_errors():
            if failing:
                raise FULL
    if how == "all":
        with multihost.collective_errors():
            raise UserError(f"the {jax.process_index()} of all")
    if how == "stopped":
        if failing:
            time.sleep(3)  # as where it saves
            print("saved", flush=True)
        raise preemption.Preempted("asked to end")


if __name__ == "__main__":
    multihost.initialize()
    try:
        with multihost.peer_guard():
            multihost.all_gather_str("all are here")
            end(sys.argv[1], int(sys.argv[2]))
    except preemption.Preempted as ended:
        exit_with(str(ended), preemption.EXIT_RETRY)
    except (UserError, OSError) as error:
        exit_with(user_message(error), 2)
