"""Trains a tiny run in this process, as one of several where the environment says so: what the tests start and kill.

python -m tests.faults.driver FOLDER '{"train": {"steps": 8}, "data": {"workers": 2}}'

In the environment: JEPAX_TEST_LEAVE_AT=STEPS sends this process a SIGTERM in time to leave after so many steps,
JEPAX_TEST_DIE_AT=STEP kills process 1 in that step, JEPAX_TEST_SAVE=STEPS saves every so many steps.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

EARLIER = 2
"""Of several processes: steps from a wish to the last one that is taken, and one because the wish is seen in it."""


def main(folder: str, changes: str = "{}") -> None:
    from jepax import hosts

    if "JAX_NUM_PROCESSES" in os.environ:
        hosts.start()
    with hosts.peers():
        from jepax.saving import SaveConfig
        from jepax.train import train
        from tests.contracts.shrink import shrunk

        config = shrunk("ijepa_fashion_mnist")
        config = replace(config, eval=replace(config.eval, online=replace(config.eval.online, every=0)))
        save = SaveConfig(every=int(os.environ.get("JEPAX_TEST_SAVE", 100_000)))
        config = replace(config, train=replace(config.train, save=save))
        for part, values in json.loads(changes).items():
            if "save" in values:
                values["save"] = SaveConfig(**values["save"])
            config = replace(config, **{part: replace(getattr(config, part), **values)})
        disturb()
        train(config, Path(folder))
        print("trained", flush=True)
        hosts.leave()


def disturb() -> None:
    """What the environment asks for, just after the step was begun."""
    import jax

    from jepax import train as training

    several = jax.process_count() > 1
    leave = int(os.environ.get("JEPAX_TEST_LEAVE_AT", -1)) - (EARLIER if several else 1)
    die = int(os.environ.get("JEPAX_TEST_DIE_AT", -1))
    real = training.compiled_step

    def step(inputs: tuple, images: object, state: object) -> tuple:
        number = int(state.step)
        if number == leave and jax.process_index() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == die and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(inputs, images, state)

    training.compiled_step = step


if __name__ == "__main__":  # the workers of the loader import this file again
    from jepax import signals
    from jepax.cli import stop
    from jepax.types import UserError

    try:
        with signals.handled():
            main(*sys.argv[1:])
    except UserError as error:
        stop(str(error), 2)
    except signals.Stopped as ended:
        stop(str(ended), signals.AGAIN)
