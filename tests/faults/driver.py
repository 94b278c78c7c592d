"""Trains a tiny run in this process, as one of several where the environment says so: what the tests start and kill.

python -m tests.faults.driver FOLDER '{"train": {"steps": 8}, "data": {"num_workers": 2}}'

In the environment: JEPAX_TEST_LEAVE_AT=STEPS sends this process a SIGTERM in time to leave after so many steps,
JEPAX_TEST_DIE_AT=STEP kills process 1 in that step, JEPAX_TEST_SAVE=STEPS saves every so many steps, and
JEPAX_TEST_FAULT=NAME is one of the functions of `FAULTS`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

EARLIER = 2
"""Of several processes: steps from a wish to the last one that is taken, and one because the wish is seen in it."""


def main(folder: str, changes: str = "{}") -> None:
    from jepax.distributed import multihost

    if "JAX_NUM_PROCESSES" in os.environ:
        multihost.initialize()
    with multihost.peer_guard():
        from jepax.distributed.sharding import ShardingConfig
        from jepax.io.checkpointer import CheckpointConfig
        from jepax.training.loop import train
        from tests.contracts.shrink import shrunk

        config = shrunk("ijepa_fashion_mnist")
        config = replace(config, eval=replace(config.eval, online=replace(config.eval.online, every_steps=0)))
        save = CheckpointConfig(every_steps=int(os.environ.get("JEPAX_TEST_SAVE", 100_000)))
        config = replace(config, train=replace(config.train, checkpoint=save))
        changed = json.loads(changes)
        if online := changed.pop("online", {}):
            config = replace(config, eval=replace(config.eval, online=replace(config.eval.online, **online)))
        if encoder := changed.pop("encoder", {}):
            config = replace(config, method=replace(config.method, encoder=replace(config.method.encoder, **encoder)))
        for part, values in changed.items():
            for name, group in (("checkpoint", CheckpointConfig), ("sharding", ShardingConfig)):
                if name in values:
                    values[name] = group(**values[name])
            config = replace(config, **{part: replace(getattr(config, part), **values)})
        disturb()
        train(config, Path(folder, *FAULTS[os.environ.get("JEPAX_TEST_FAULT", "none")]()))
        print("trained", flush=True)
        multihost.shutdown()


def disturb() -> None:
    """What the environment asks for, just after the step was begun."""
    import jax

    from jepax.training import loop as training

    several = jax.process_count() > 1
    leave = int(os.environ.get("JEPAX_TEST_LEAVE_AT", -1)) - (EARLIER if several else 1)
    die = int(os.environ.get("JEPAX_TEST_DIE_AT", -1))
    real = training.run_train_step

    def step(state: object, *rest: object) -> tuple:
        number = int(state.step)
        if number == leave and jax.process_index() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == die and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(state, *rest)

    training.run_train_step = step


def spoilt(owner: object, name: str, process: int, before: Callable[..., object]) -> tuple[()]:
    """In this process, `before` is called before the function, with its arguments."""
    import jax

    real = getattr(owner, name)

    def function(*arguments: object, **named: object) -> object:
        before(*arguments)
        return real(*arguments, **named)

    if jax.process_index() == process:
        setattr(owner, name, function)
    return ()


def full_disk() -> tuple[()]:
    from jepax.io import checksums

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    return spoilt(checksums, "compute_checksums", 0, full)


def slow_disk() -> tuple[()]:
    """Process 0 takes longer to finish a checkpoint."""
    from jepax.io import checksums

    return spoilt(checksums, "compute_checksums", 0, lambda folder: time.sleep(4))


def not_finite() -> tuple[()]:
    """Training ends with a dump, which takes process 0 longer."""
    from jepax.io import config_yaml as configs
    from jepax.training import monitor

    def push(self: monitor.StepInspector, step: int, metrics: object, batch: object) -> None:
        raise monitor.NonFiniteError(step, batch, {"train/loss": "nan", "optim/grad_norm": "nan"})

    monitor.StepInspector.push = push
    return spoilt(configs, "save", 0, lambda config, path: "dumps" in path.parts and time.sleep(4))


def other_pictures() -> tuple[()]:
    import jax

    from jepax.data.sources.synthetic import Synthetic

    contents = {"pictures": f"those of {jax.process_index()}", "alike": "in all"}
    Synthetic.fingerprint = property(lambda self: contents)
    return ()


def own_folder() -> tuple[str]:
    """Each process has a folder of its own, of which it thinks that all see it."""
    import jax

    from jepax.io import lock

    lock.SHARED_FS_TIMEOUT_S = 1
    return (f"of {jax.process_index()}",)


def other_clock() -> tuple[()]:
    """By the clock of process 1 it is always time to save."""
    import jax

    from jepax.io.checkpointer import CheckpointManager

    CheckpointManager.timer_expired = lambda self: jax.process_index() == 1
    return ()


FAULTS = {each.__name__: each for each in (full_disk, slow_disk, not_finite, other_pictures, own_folder, other_clock)}
FAULTS["none"] = tuple


if __name__ == "__main__":  # the workers of the loader import this file again
    from jepax.cli import exit_with
    from jepax.distributed import preemption
    from jepax.types import UserError

    try:
        with preemption.install_handlers():
            main(*sys.argv[1:])
    except UserError as error:
        exit_with(str(error), 2)
    except preemption.Preempted as ended:
        exit_with(str(ended), preemption.EXIT_RETRY)
