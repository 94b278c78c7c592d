"""Several processes: the same numbers as one, the same last step, and an end for all if one of them is lost."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepax.data import corrupt
from jepax.distributed import multihost, preemption, sharding
from jepax.io import checkpoint
from jepax.io.logger import read_metrics
from jepax.types import UserError
from tests.faults.conftest import Processes, of_session

LONG = {"steps": 100_000, "log_every_steps": 5}
HEARTBEAT = 10
LOST = (preemption.EXIT_RETRY, -signal.SIGABRT)
"""Codes of a process that lost another one: ours if a collective failed, else that of JAX's coordination service."""
ENV = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_the_environment_says_who_takes_part():
    assert multihost.env_config({}) == {} == multihost.env_config({"JAX_COORDINATOR_ADDRESS": "host:1"})
    assert multihost.env_config(ENV) == {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize("change, said", [
    ({"JAX_COORDINATOR_ADDRESS": None}, "JAX_COORDINATOR_ADDRESS is not"),
    ({"JAX_PROCESS_ID": "2"}, "not below JAX_NUM_PROCESSES=2"),
    ({"JAX_NUM_PROCESSES": "two"}, "no whole number"),
])  # fmt: skip
def test_an_environment_without_sense_is_refused(change, said):
    environment = {name: value for name, value in (ENV | change).items() if value is not None}
    with pytest.raises(UserError, match=said):
        multihost.env_config(environment)


def test_one_process_needs_no_one():
    agreement = multihost.CollectiveFlag(sharding.make_mesh())
    assert agreement(True, False) == (True, False)
    assert multihost.is_main_process() and multihost.broadcast(3) == 3 and multihost.all_gather_str("a") == ["a"]
    with multihost.peer_guard(), multihost.collective_errors():
        multihost.shutdown()
    with pytest.raises(UserError, match="mine"), multihost.collective_errors():
        raise UserError("mine")


@pytest.mark.fault(4, "a signal reaches several processes at different steps")
def test_processes_stop_after_the_same_step_and_share_refusals(processes):
    both = processes.group("meeting", "30", "17")
    assert [process.wait(90) for process in both] == [0, 0], processes.said(both[0])
    first, second = (json.loads(processes.said(process).splitlines()[-1]) for process in both)
    assert first["stopped"] == second["stopped"] == 18  # the step after that of the first wish
    assert first["same"] == second["same"] == 5
    assert first["texts"] == second["texts"] == ["from 0", "from 1"]
    assert second["refusals"] == ["no pictures here", "No space left: a/file"]
    assert first["refusals"] == [f"process 1: {text}" for text in second["refusals"]]
    assert first["alone"] == 3.0  # a process may work on after the parting


FULL = "No space left on device: a/file"
ENDS = {
    "together": (2, FULL, "process {}: " + FULL),
    "all": (2, "the {} of all", "the {} of all"),
    "stopped": (preemption.EXIT_RETRY, "asked to end", "asked to end"),
}
"""By the way in which processes end: the code of all, the message of the one that fails or is slow, and the others'."""


def messages(processes: Processes, process) -> list[str]:
    assert "Traceback" not in processes.said(process)
    return [line for line in processes.said(process).splitlines() if line.startswith("jepax: ")]


@pytest.mark.fault(12, "several processes end together")
@pytest.mark.parametrize("slow", [0, pytest.param(1, marks=pytest.mark.slow_fault)], ids=["coordinator", "other"])
@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.slow_fault] * (how == "all")) for how in ENDS])
def test_all_end_with_the_code_and_the_message_of_the_one(processes, how, slow):
    code, own, others = ENDS[how]
    group = processes.group("failing", how, str(slow), count=3)
    assert [process.wait(90) for process in group] == [code] * 3, "".join(map(processes.said, group))
    for index, process in enumerate(group):
        wanted = own.format(index) if index == slow else others.format(index if how == "all" else slow)
        assert messages(processes, process) == [f"jepax: {wanted}"], processes.said(process)


@pytest.mark.fault(12, "one of several processes fails alone")
@pytest.mark.parametrize("failing", [0, 1], ids=["coordinator", "other"])
@pytest.mark.parametrize(
    "how, message",
    [("alone", "no pictures here"), pytest.param("system", FULL, marks=pytest.mark.slow_fault)],
    ids=["alone", "system"],
)
def test_one_that_fails_says_why_and_the_others_end(processes, how, message, failing):
    group = processes.group("failing", how, str(failing), count=3)
    codes = [process.wait(60) for process in group]
    assert codes.pop(failing) == 2 and set(codes) <= set(LOST), "".join(map(processes.said, group))
    assert messages(processes, group[failing]) == [f"jepax: {message}"]


@pytest.mark.fault(12, "one of several processes fails, and another hangs")
def test_one_that_fails_ends_at_once_though_another_hangs(processes):
    first, second, _ = processes.group("failing", "stuck", "1", count=3)
    assert second.wait(60) == 2 and messages(processes, second) == ["jepax: no pictures here"]
    assert first.wait(HEARTBEAT + 15) in LOST, processes.said(first)


@pytest.mark.fault(12, "one of several processes saves longer than the others")
def test_no_process_ends_before_all_have_saved(processes):
    """A scheduler ends those that are left when the first one ends."""
    first, second = processes.group("failing", "stopped", "0")
    assert second.wait(90) == preemption.EXIT_RETRY and "saved" in processes.said(first)


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / "metrics.jsonl")]


STEPS = '{"train": {"steps": 14, "log_every_steps": 1}}'


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
@pytest.mark.fault(10, "several processes evaluate while they train")
def test_two_processes_score_what_one_does(processes, tmp_path):
    changes = json.dumps({"train": {"steps": 6, "log_every_steps": 1}, "online": {"every_steps": 3}})
    alone = [processes.start("driver", str(tmp_path / "one"), changes)]
    assert [process.wait(150) for process in alone] == [0], processes.said(alone[0])
    both = processes.group("driver", str(tmp_path / "two"), changes, devices=2)
    assert [process.wait(150) for process in both] == [0, 0], processes.said(both[0]) + processes.said(both[1])
    one, two = (
        [line.get("val/knn_top1") for line in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("one", "two")
    )
    assert one == two and [score is not None for score in one] == [False, False, True] * 2


def part(processes: Processes, run: str, changes: str, count: int, devices: int, leave: int | None) -> None:
    """Takes the run on in so many processes of so many devices, up to the step `leave` or to its end."""
    leaving = {} if leave is None else {"JEPAX_TEST_LEAVE_AT": str(leave)}
    if count == 1:
        started = [processes.start("driver", run, changes, devices=devices, **leaving)]
    else:
        started = processes.group("driver", run, changes, count=count, devices=devices, **leaving)
    codes = [process.wait(150) for process in started]
    assert codes == [preemption.EXIT_RETRY if leaving else 0] * count, "".join(map(processes.said, started))


@pytest.mark.slow_fault
@pytest.mark.fault(10, "another number of devices and processes at every resume")
def test_a_run_goes_on_with_any_number_of_devices_and_processes(processes, tmp_path, alone):
    """Two steps each on 1, 2, 4 and 8 devices of one process, then of 2 processes, and the rest in one."""
    run, taken = str(tmp_path / "run"), 0
    for count, devices in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (1, 1)):
        taken += 2
        part(processes, run, STEPS, count, devices, taken if taken < 14 else None)
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-5)


@pytest.mark.slow_fault
@pytest.mark.fault(10, "the state lies split over several processes")
def test_processes_that_share_the_state_take_the_steps_of_one(processes, tmp_path):
    """Split over two processes, which save it together; then over the devices of one; then over two again."""
    train, run = {"steps": 8, "log_every_steps": 1}, str(tmp_path / "run")
    whole, split = (
        json.dumps({"encoder": {"width": 96, "num_heads": 4}, "train": train | {"sharding": {"params": params}}})
        for params in ("ddp", "fsdp")
    )
    alone = processes.start("driver", str(tmp_path / "one"), whole)
    assert alone.wait(150) == 0, processes.said(alone)
    for count, devices, leave in ((2, 2, 3), (1, 4, 5), (2, 1, None)):
        part(processes, run, split, count, devices, leave)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow_fault
@pytest.mark.fault(12, "a peer process is lost: the same command again")
def test_after_a_loss_the_same_command_goes_on(processes, tmp_path, alone):
    run = tmp_path / "run"
    both = processes.group("driver", str(run), STEPS, heartbeat=HEARTBEAT, JEPAX_TEST_DIE_AT="9", JEPAX_TEST_SAVE="4")
    first, second = (process.wait(150) for process in both)
    assert first in LOST and second == -signal.SIGKILL, processes.said(both[0])
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
def test_a_lost_peer_ends_the_other_in_time(processes, tmp_path, lost, how, when):
    saving = when == "in a save"
    both = training(
        processes, tmp_path / "run", LONG | ({"checkpoint": {"every_steps": 5}} if saving else {}), {"num_workers": 1}
    )
    if saving:
        saves = tmp_path / "run" / "checkpoints"
        processes.until(lambda: any(saves.glob("*.part")), 60, 0.002)
    os.kill(both[lost].pid, how)
    start, other = time.monotonic(), both[1 - lost]
    assert other.wait(HEARTBEAT + 15) in LOST, processes.said(other)
    assert time.monotonic() - start < HEARTBEAT + 10
    deadline = time.monotonic() + 10
    while of_session(other) and time.monotonic() < deadline:  # its worker, and what tracks its shared memory
        time.sleep(0.1)
    assert of_session(other) == []


def ended(processes: Processes, run: Path, fault: str, codes: list, train: dict, **settings: dict) -> list[str]:
    """Output of two processes that train with this fault and end with one of these codes each."""
    changes = json.dumps({"train": train, **settings})
    both = processes.group("driver", str(run), changes, heartbeat=HEARTBEAT, JEPAX_TEST_FAULT=fault)
    said = [processes.said(process) for process in both if process.wait(150) is not None]
    for process, code in zip(both, codes, strict=True):
        assert process.returncode in (code if isinstance(code, tuple) else (code,)), "".join(said)
    assert "Traceback" not in "".join(said)
    return [text.split("jepax: ", 1)[-1] for text in said]


@pytest.mark.slow_fault
@pytest.mark.fault(12, "process 0 fails alone: the disk is full")
def test_what_one_process_cannot_write_ends_all(processes, tmp_path):
    first, _ = ended(
        processes, tmp_path / "run", "full_disk", [2, LOST], {"steps": 1000, "checkpoint": {"every_steps": 3}}
    )
    assert first.startswith(f"checkpoint {tmp_path / 'run'}/checkpoints/00000003 could not be written: [Errno 28] No")


@pytest.mark.slow_fault
@pytest.mark.fault(12, "a process other than 0 fails alone: its data worker is killed")
def test_a_killed_worker_of_one_process_ends_all(processes, tmp_path):
    first, second = training(processes, tmp_path / "run", LONG, {"num_workers": 1})
    worker = next(pid for pid in of_session(second) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    assert second.wait(30) == 2 and first.wait(30) in LOST, processes.said(first) + processes.said(second)
    assert "jepax: one of the data.num_workers=1 processes" in processes.said(second)


@pytest.mark.slow_fault
@pytest.mark.fault(4, "processes are asked to end, and process 0 saves longer than the others")
def test_no_process_ends_before_the_checkpoint_counts(processes, tmp_path):
    """Or a scheduler that ends the others when one has ended would end the save."""
    settings = json.dumps({"train": {"steps": 100}})
    first, second = processes.group(
        "driver", str(tmp_path), settings, JEPAX_TEST_LEAVE_AT="4", JEPAX_TEST_FAULT="slow_disk"
    )
    assert second.wait(150) == preemption.EXIT_RETRY, processes.said(second)
    assert (tmp_path / "checkpoints/00000004").is_dir(), processes.said(first)
    assert first.wait(20) == preemption.EXIT_RETRY
    for process in (first, second):
        assert processes.said(process).splitlines()[-1].startswith("jepax: stopped on request after step 4 of 100")


@pytest.mark.slow_fault
@pytest.mark.fault(12, "training diverges, and the dump takes process 0 longer than the others")
def test_no_process_ends_before_the_dump_is_written(processes, tmp_path):
    said = ended(processes, tmp_path, "not_finite", [2, 2], {"steps": 100})
    assert {path.name for path in (tmp_path / "dumps/step_00000000").iterdir()} == {
        *("batch_0.npz", "batch_1.npz", "config.yaml", "dump.json", "state")
    }
    assert said[0] == said[1] and said[0].startswith("10 consecutive steps, up to step 0, were not finite")


@pytest.mark.slow_fault
@pytest.mark.fault(12, "the hosts hold other pictures")
def test_hosts_with_other_pictures_are_refused(processes, tmp_path):
    first, second = ended(processes, tmp_path / "run", "other_pictures", [2, 2], {"steps": 100})
    assert first == second and first.splitlines() == [
        "process 1 has other data than process 0, 1 part differs (0 -> 1):",
        "pictures: those of 0 -> those of 1",
        "give every host the same files, or all of them a data.root that they share",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow_fault
@pytest.mark.fault(12, "the hosts do not share the folder of the run")
def test_a_folder_that_the_hosts_do_not_share_is_refused(processes, tmp_path):
    first, second = ended(processes, tmp_path, "own_folder", [2, 2], {"steps": 100})
    assert f"{tmp_path / 'of 1'} on " in second and "choose a --run-dir on a file system that all hosts share" in second
    assert first == f"process 1: {second}"
    assert [path.name for path in tmp_path.glob("of */*")] == ["lock"]


@pytest.mark.slow_fault
@pytest.mark.fault(10, "the hosts' clocks differ, and pictures cannot be read")
def test_one_clock_decides_and_every_process_tells_of_pictures(processes, tmp_path):
    root, run = tmp_path / "data", tmp_path / "run"
    for row in range(80):
        path = root / f"train/{'ab'[row % 2]}/{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (24, 24), row).save(path) if row % 8 > 1 else path.touch()
    data = {"dataset": "image_folder", "root": str(root), "max_corrupt_fraction": 1.0}
    train = {"steps": 8, "checkpoint": {"every_steps": 100, "max_to_keep": 9}}
    said = ended(processes, run, "other_clock", [0, 0], train, data=data)
    assert checkpoint.list_steps(run / "checkpoints") == [8]
    mine, others = (path.read_text().splitlines() for path in corrupt.find_lists(run))
    assert min(len(mine), len(others)) > 3
    printed = [file for line in others if f"warning: {(file := json.loads(line)['file'])}" in said[1]]
    assert len(printed) > 3  # the first ten of both processes together


@pytest.mark.slow_fault
@pytest.mark.fault(12, "a peer process is lost")
def test_a_peer_that_never_comes_ends_the_process(processes):
    alone = processes.start("absent", **ENV | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"})
    assert alone.wait(60) == -signal.SIGABRT
    assert "DEADLINE_EXCEEDED" in processes.said(alone)
