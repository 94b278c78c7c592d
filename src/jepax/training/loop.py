"""The training loop: restore, then for each batch: step, inspect, log, evaluate, save. `step.py` has the step."""

import math
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jepax.data import CorruptLog, Source, corrupt_file
from jepax.distributed import multihost, preemption, sharding
from jepax.distributed.malloc import trim_heap
from jepax.health.alerts import write_alerts
from jepax.health.watchdog import Watchdog
from jepax.io import checkpoint, config_yaml, events, lock, logger
from jepax.io.checkpointer import METRICS_KEY, CheckpointManager
from jepax.io.events import Events
from jepax.io.logger import Log, print_warning
from jepax.io.trackers import Trackers
from jepax.training import nan_dump
from jepax.training.config import Config, check_run_dir, resolve_compute_dtype, write_run_config
from jepax.training.monitor import (
    ADVICE,
    DivergedError,
    NonFiniteError,
    OnlineScores,
    StepInspector,
    diverged,
    log_values,
    make_online_eval,
    track_update_norms,
)
from jepax.training.setup import Setup, make_setup
from jepax.training.speed import make_speed_metrics
from jepax.training.step import TrainState, is_log_step, run_train_step
from jepax.trees import all_finite


def train(
    config: Config,
    run_dir: Path,
    *,
    source: Source | None = None,
    allow_changes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> TrainState:
    """Train in the folder `run_dir`, or resume there, bit for bit as if nothing had interrupted the run.

    `source` replaces the training data that the config names; its batches may be any pytree that the method reads.
    `allow_changes` names settings, or groups of them, in which the config may differ from the folder's; "data" allows
    other data. `notes` are printed when all checks have passed. SIGTERM and SIGINT stop training after a step, which is
    saved: then it raises `Preempted`. Raises `UserError` if another process uses the folder, if it contains another
    run, if no checkpoint in it is valid, if a checkpoint cannot be written, and if training diverges.
    """
    # Data, optimizer, sharding and keys: everything that does not depend on the folder.
    setup = make_setup(config, source)
    with ExitStack() as stack:
        # One run at a time in a folder, and a folder that belongs to this run. `collective_errors` raises an error of
        # one process in all of them: otherwise the others would wait for it forever.
        with multihost.collective_errors():
            if multihost.is_main_process():
                stack.enter_context(lock.run_lock(run_dir))
        with multihost.collective_errors():
            lock.check_shared_filesystem(run_dir)
        with multihost.collective_errors():
            check_run_dir(run_dir, config, setup.source, allow_changes)

        # The newest valid checkpoint, or the initial state.
        state, start, metadata = restore(setup, run_dir)
        event_log = record_start(setup, run_dir, start)

        if notes and multihost.is_main_process():
            print(*notes, sep="\n", file=sys.stderr)

        # From here on a signal stops the loop after a step.
        stack.enter_context(preemption.defer())
        return fit(setup, run_dir, state, start, metadata, event_log)


def fit(
    setup: Setup, run_dir: Path, state: TrainState, start: int, metadata: dict[str, Any], event_log: Events
) -> TrainState:
    """for batch: step -> inspect -> log -> evaluate -> save, up to the last step or a request to stop."""
    config, total_steps, mesh = setup.config, setup.total_steps, setup.plan.mesh
    context, base_key = setup.context, setup.base_key
    save_config, best_metric = config.train.checkpoint, config.train.checkpoint.best_metric
    loggers = config.train.loggers if multihost.is_main_process() else ()

    # What the run writes and reads; each is closed even if training fails.
    with (
        Log(run_dir / logger.METRICS_FILE, steps=total_steps, start=start) as log,
        CheckpointManager(run_dir / "checkpoints", save_config, log.print, log_files(run_dir)) as checkpoints,
        Trackers(loggers, run_dir, config_yaml.to_dict(config), log.print) as trackers,
        closing(train_batches(setup, run_dir, start, log.print)) as batches,
    ):
        # What the run remembers from before it was interrupted: peaks since the last record, alarms, the best score.
        log.print_header(run_dir, config.train.batch_size, str(setup.plan))
        inspector = StepInspector(config, event_log, log.print, metadata.get("peaks", {}))
        watchdog, best = Watchdog(log.previous_lines), dict(metadata.get("best", {}))
        write_alerts(run_dir, watchdog.alarms)
        last_logged = log.previous_lines[-1]["step"] if log.previous_lines else -1
        online = OnlineScores(config, make_online_eval(config, setup.source, total_steps), last_logged)
        any_process, speed_metrics = multihost.CollectiveFlag(mesh), make_speed_metrics(setup)
        try:
            for step, batch in enumerate(batches, start):
                is_last = step + 1 == total_steps
                should_log = is_log_step(step, config.train.log_every_steps, total_steps)

                # Step. An accelerator computes while the host goes on, so nothing here may read this step's results.
                measure = track_update_norms(state.method, step) if should_log else None
                state, metrics = run_train_step(state, sharding.shard_batch(batch, mesh), base_key, context)
                metrics |= measure(state.method, metrics) if measure else {}

                # All processes stop and save after the same step. With several, the flags are those of the step before.
                stop, timer_expired = any_process(
                    preemption.stop_requested(), multihost.is_main_process() and checkpoints.timer_expired()
                )

                # Inspect the step before this one, whose results are ready: too many skipped steps end the run here.
                inspector.push(step, metrics, batch)
                if step == start:
                    log.report_compile_time(metrics["train/loss"])
                    trim_heap()  # returns the compiler's memory to the system

                # Log, and evaluate if it is time. `flush` waits for this step, so the peaks include it.
                is_best = False
                if should_log:
                    inspector.flush()
                    values = log_values(metrics) | speed_metrics(log.seconds_per_step(step)) | inspector.take_peaks()
                    if online.is_due(step):
                        with log.pause_timer():
                            values |= online(step, state.method)
                    record = log.write(step, values)
                    trackers.send(step, record)
                    if alerts := watchdog.update(record):
                        write_alerts(run_dir, watchdog.alarms)
                    for alert in alerts:
                        log.print(f"warning: {alert}; try {alert.advice}")
                    is_best = update_best(best, best_metric, values)

                # Save: by the step's number, the clock, a request to stop, the best score, or at the end. A state that
                # is not finite is never saved.
                if is_best or stop or timer_expired or checkpoints.should_save(step + 1) or is_last:
                    inspector.flush()
                    if not all_finite(state.method):
                        raise diverged(step, f"parameters are not finite after step {step}")
                    scores = {METRICS_KEY: {best_metric: best[best_metric]}} if is_best else {}
                    checkpoints.save(step + 1, state, {"peaks": dict(inspector.peaks), "best": dict(best)} | scores)
                log.set_progress(step)
                if stop:
                    checkpoints.wait()
                    raise preemption.Preempted(
                        f"stopped on request after step {step + 1} of {total_steps}; rerun the same command to resume"
                    )
        except NonFiniteError as error:
            # The guard skipped too many steps: store the last one for `jepax replay`, and stop.
            dump = nan_dump.write_dump(run_dir, state, error, config, setup.optimizer)
            limit = config.train.grad_guard.max_consecutive_nonfinite
            stopped = DivergedError(
                error.step,
                f"{limit} consecutive steps, up to step {error.step}, were not finite: training stopped;\n"
                f"jepax replay {dump} repeats that step; {ADVICE}",
            )
            record_stop(run_dir, watchdog, inspector, stopped)
            with multihost.collective_errors():  # every process has written its part
                raise stopped from error
        except DivergedError as error:
            record_stop(run_dir, watchdog, inspector, error)
            raise
    return state


def restore(setup: Setup, run_dir: Path) -> tuple[TrainState, int, dict[str, Any]]:
    """The state of the newest valid checkpoint, its step, and its metadata; or the initial state and step 0.

    Corrupt checkpoints are renamed, not deleted. The state is restored by shape: never two states in memory.
    """
    # The main process decides from which step on; the others follow.
    folder = run_dir / "checkpoints"
    with multihost.collective_errors():
        newest = find_checkpoint(run_dir, folder) if multihost.is_main_process() else 0
    start = multihost.broadcast(newest)
    if not start:
        return setup.init_state(), 0, {}

    # Read into the run's own sharding; `find_checkpoint` has verified the files.
    abstract = setup.plan.abstract(setup.abstract_state())
    with multihost.collective_errors():
        state = checkpoint.restore(folder, start, abstract, check=False)
    return state, start, checkpoint.metadata(folder, start)


def find_checkpoint(run_dir: Path, folder: Path) -> int:
    """The step of the newest valid checkpoint, 0 if there is none; corrupt ones are moved out of the way."""
    # Corrupt checkpoints are renamed, so that they are neither read nor counted.
    step, corrupt = checkpoint.latest_valid(folder)
    for number, problems in corrupt.items():
        path = checkpoint.step_dir(folder, number)
        print_warning(f"checkpoint {path} is corrupt; moved to {path.name}.corrupt: {problems[0]}")
    checkpoint.quarantine(folder, corrupt)

    # A run without a finished checkpoint starts again.
    if step is None and logger.read_metrics(run_dir / logger.METRICS_FILE):
        print_warning(f"{run_dir} was started, but has no finished checkpoint: it starts again at step 0")
    return step or 0


def record_start(setup: Setup, run_dir: Path, start: int) -> Events:
    """Write config.yaml and the first event; warn if the precision differs from that of the run so far."""
    # The folder's config is the one of the newest command that trained.
    writes = multihost.is_main_process() and start < setup.total_steps
    changed = write_run_config(run_dir, setup.config, setup.source) if writes else []

    # Events of steps that are repeated are dropped, as their records in metrics.jsonl are.
    event_log, dtype = Events(run_dir), jnp.dtype(resolve_compute_dtype(setup.config)).name
    event_log.truncate_from(start)

    # A run may go on in another precision, but not silently.
    if start and (before := event_log.last("compute_dtype", dtype)) != dtype:
        print_warning(f"{run_dir} computed in {before} before and computes in {dtype} here: losses will differ")

    name = "resumed" if start else "started"
    event_log.add(name, start, devices=jax.device_count(), compute_dtype=dtype, changed=changed)
    return event_log


def record_stop(run_dir: Path, watchdog: Watchdog, inspector: StepInspector, error: DivergedError) -> None:
    """Write to health.json why training stopped, with alerts on the steps since the last log step."""
    watchdog.update({"step": error.step, **inspector.take_peaks()})
    write_alerts(run_dir, watchdog.alarms, ended=str(error).splitlines()[0])


def update_best(best: dict[str, float], name: str | None, values: dict[str, Any]) -> bool:
    """True if this log step has the best value so far of `train.checkpoint.best_metric`, which `best` then stores."""
    # Most log steps have no evaluation, and without a best_metric the name is None.
    if name not in values:
        return False

    # All processes save, or none: the main process decides.
    is_best = bool(multihost.broadcast(int(values[name] > best.get(name, -math.inf))))
    if is_best:
        best[name] = values[name]
    return is_best


def train_batches(setup: Setup, run_dir: Path, start: int, print: Callable[[str], None]) -> Generator[Any, None, None]:
    """This host's slices of the remaining batches; files that cannot be read are replaced and listed in the folder."""
    # `print` is the log's: it keeps the progress bar intact. Only the main process has one that prints.
    if not multihost.is_main_process():
        print = lambda text: print_warning(text.removeprefix("warning: "))  # noqa: E731
    path = run_dir / corrupt_file(jax.process_index())
    corrupt = CorruptLog(setup.source, path, setup.config.data.max_corrupt_fraction, print)
    return setup.batches(start, on_corrupt=corrupt)


def log_files(run_dir: Path) -> list[Path]:
    """Files that must be on the disk up to a step before its checkpoint counts."""
    return [run_dir / name for name in (logger.METRICS_FILE, events.EVENTS_FILE, corrupt_file())]
