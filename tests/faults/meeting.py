"""Two processes that take steps, agree, tell each other things and part: python -m tests.faults.meeting STEP STEP.

Process p wishes to stop from the p-th STEP onwards. Prints a line of JSON.
"""

import json
import sys

import jax
import numpy as np

from jepax.distributed import multihost, sharding
from jepax.types import UserError


def stopped_after(wishes: list[int]) -> int:
    mesh = sharding.make_mesh()
    x = sharding.replicate(np.ones((8, 8), np.float32), mesh)
    step, agreement = jax.jit(lambda x: x @ x / 8), multihost.CollectiveFlag(mesh)
    for taken in range(200):
        x = step(x)
        if agreement(taken >= wishes[jax.process_index()])[0]:
            return taken
    return -1


def refusal(failure: Exception) -> str:
    try:
        with multihost.collective_errors():
            if jax.process_index() == 1:
                raise failure
    except multihost.CollectiveError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    multihost.initialize()
    with multihost.peer_guard():
        said = {
            "stopped": stopped_after([int(word) for word in sys.argv[1:]]),
            "same": multihost.broadcast(jax.process_index() + 5),
            "texts": multihost.all_gather_str(f"from {jax.process_index()}"),
            "refusals": [refusal(UserError("no pictures here")), refusal(OSError(28, "No space left", "a/file"))],
        }
        multihost.shutdown()
    print(json.dumps(said | {"alone": float(jax.numpy.ones(3).sum())}), flush=True)
