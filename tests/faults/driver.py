"""Trains a tiny run in this process, as one of several where the environment says so: what the tests start and kill.

python -m tests.faults.driver FOLDER '{"train": {"steps": 8}, "data": {"workers": 2}}'
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path


def main(folder: str, changes: str = "{}") -> None:
    from jepax import hosts

    if "JAX_NUM_PROCESSES" in os.environ:
        hosts.start()
    with hosts.peers():
        from jepax.train import train
        from tests.contracts.shrink import shrunk

        config = shrunk("ijepa_fashion_mnist")
        config = replace(config, eval=replace(config.eval, online=replace(config.eval.online, every=0)))
        for part, values in json.loads(changes).items():
            config = replace(config, **{part: replace(getattr(config, part), **values)})
        train(config, Path(folder))
        print("trained", flush=True)
        hosts.leave()


if __name__ == "__main__":  # the workers of the loader import this file again
    from jepax.cli import stop
    from jepax.types import UserError

    try:
        main(*sys.argv[1:])
    except UserError as error:
        stop(str(error), 2)
