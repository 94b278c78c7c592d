"""Several processes: the same numbers as one, the same last step, and an end in words when one of them is lost."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jepax import hosts, sharding, signals
from jepax.logs import read
from jepax.types import UserError
from tests.faults.conftest import Processes, of_session

LONG = {"steps": 100_000, "log_every": 5}
HEARTBEAT = 10
ENV = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_the_environment_says_who_takes_part():
    assert hosts.by_hand({}) == {} == hosts.by_hand({"JAX_COORDINATOR_ADDRESS": "host:1"})
    assert hosts.by_hand(ENV) == {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize("change, said", [
    ({"JAX_COORDINATOR_ADDRESS": None}, "JAX_COORDINATOR_ADDRESS is not"),
    ({"JAX_PROCESS_ID": "2"}, "not below JAX_NUM_PROCESSES=2"),
    ({"JAX_NUM_PROCESSES": "two"}, "no whole number"),
])  # fmt: skip
def test_an_environment_without_sense_is_refused(change, said):
    environment = {name: value for name, value in (ENV | change).items() if value is not None}
    with pytest.raises(UserError, match=said):
        hosts.by_hand(environment)


def test_one_process_needs_no_one():
    agreement = hosts.Agreement(sharding.make_mesh())
    assert agreement(True, False) == (True, False)
    assert hosts.first() and hosts.same(3) == 3 and hosts.exchange("a") == ["a"]
    with hosts.peers(), hosts.together():
        hosts.leave()
    with pytest.raises(UserError, match="mine"), hosts.together():
        raise UserError("mine")


@pytest.mark.fault(4, "a signal reaches several processes at different steps")
def test_processes_stop_after_the_same_step_and_share_refusals(processes):
    both = processes.group("meeting", "30", "17")
    assert [process.wait(90) for process in both] == [0, 0], processes.said(both[0])
    first, second = (json.loads(processes.said(process).splitlines()[-1]) for process in both)
    assert first["stopped"] == second["stopped"] == 18  # the step after that of the first wish
    assert first["same"] == second["same"] == 5
    assert first["texts"] == second["texts"] == ["from 0", "from 1"]
    assert (first["refusal"], second["refusal"]) == ("process 1: no pictures here", "no pictures here")
    assert first["alone"] == 3.0  # a process may work on after the parting


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read(run / "metrics.jsonl")]


STEPS = '{"train": {"steps": 14, "log_every": 1}}'


@pytest.fixture(scope="module")
def alone(processes_of_module, tmp_path_factory):
    """The losses of a run on one device that nothing interrupted."""
    run = tmp_path_factory.mktemp("one") / "run"
    process = processes_of_module.start("driver", str(run), STEPS)
    assert process.wait(150) == 0, processes_of_module.said(process)
    return losses(run)


@pytest.mark.slow_fault
@pytest.mark.fault(10, "another number of devices and processes")
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_take_the_steps_of_one(processes, tmp_path, devices, alone):
    both = processes.group("driver", str(tmp_path / "run"), STEPS, devices=devices)
    assert [process.wait(150) for process in both] == [0, 0], processes.said(both[0]) + processes.said(both[1])
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-5)


@pytest.mark.slow_fault
@pytest.mark.fault(10, "another number of devices and processes at every resume")
def test_a_run_goes_on_with_any_number_of_devices_and_processes(processes, tmp_path, alone):
    """Two steps each on 1, 2, 4 and 8 devices of one process, then of 2 processes, and the rest in one."""
    run, taken = str(tmp_path / "run"), 0
    for count, devices in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (1, 1)):
        taken += 2
        leave = {"JEPAX_TEST_LEAVE_AT": str(taken)} if taken < 14 else {}
        if count == 1:
            started = [processes.start("driver", run, STEPS, devices=devices, **leave)]
        else:
            started = processes.group("driver", run, STEPS, count=count, devices=devices, **leave)
        codes = [process.wait(150) for process in started]
        assert codes == [signals.AGAIN if leave else 0] * count, "".join(map(processes.said, started))
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-5)


@pytest.mark.slow_fault
@pytest.mark.fault(12, "a peer process is lost: the same command again")
def test_after_a_loss_the_same_command_goes_on(processes, tmp_path, alone):
    run = tmp_path / "run"
    both = processes.group("driver", str(run), STEPS, heartbeat=HEARTBEAT, JEPAX_TEST_DIE_AT="9", JEPAX_TEST_SAVE="4")
    assert sorted(process.wait(150) for process in both) == [-signal.SIGKILL, signals.AGAIN]
    both = processes.group("driver", str(run), STEPS, JEPAX_TEST_SAVE="4")
    assert [process.wait(150) for process in both] == [0, 0], processes.said(both[0]) + processes.said(both[1])
    np.testing.assert_allclose(losses(run), alone, rtol=1e-5)


def training(processes: Processes, run: Path, train: dict, data: dict) -> list:
    both = processes.group("driver", str(run), json.dumps({"train": train, "data": data}), heartbeat=HEARTBEAT)
    log = run / "metrics.jsonl"
    processes.until(lambda: log.exists() and log.read_text().count("\n") > 2, 150)
    return both


@pytest.mark.slow_fault
@pytest.mark.fault(12, "a peer process is lost")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize("lost", [0, 1], ids=["coordinator", "other"])
@pytest.mark.parametrize("when", ["in a step", "in a save"])
def test_a_lost_peer_ends_the_other_in_time_with_a_line(processes, tmp_path, lost, how, when):
    saving = when == "in a save"
    both = training(processes, tmp_path / "run", LONG | ({"save": {"every": 5}} if saving else {}), {"workers": 1})
    if saving:
        saves = tmp_path / "run" / "checkpoints"
        processes.until(lambda: any(saves.glob("*.part")), 60, 0.002)
    os.kill(both[lost].pid, how)
    start, other = time.monotonic(), both[1 - lost]
    assert other.wait(HEARTBEAT + 15) == signals.AGAIN, processes.said(other)
    assert time.monotonic() - start < HEARTBEAT + 10
    assert processes.said(other).count(hosts.MESSAGE) == 1
    deadline = time.monotonic() + 10
    while of_session(other) and time.monotonic() < deadline:  # its worker, and what tracks its shared memory
        time.sleep(0.1)
    assert of_session(other) == []


@pytest.mark.slow_fault
@pytest.mark.fault(12, "a peer process is lost")
def test_a_peer_that_never_comes_is_named(processes):
    alone = processes.start("absent", **ENV | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"})
    assert alone.wait(60) == signals.AGAIN
    assert "did not find the others of its run within 3 s" in processes.said(alone)
