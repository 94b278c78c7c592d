"""The training loop, from a `Config` to a trained state: `step.py` holds the step that it takes."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr

from jepax import checkpoint, dump, events, guard, lock, logs, movement, sharding
from jepax import config as configs
from jepax.data import CorruptLog, OnCorrupt, Source, batches, corrupt_file
from jepax.distributed import multihost, preemption
from jepax.distributed.malloc import trim_heap
from jepax.logs import Log, warn
from jepax.monitor import Diverged, Monitor, NotFinite, RollBack, online_of
from jepax.saving import CheckpointManager
from jepax.settings import Config, claim, compute_dtype, prepare, record, refuse_unequal_data
from jepax.step import Fixed, TrainState, compiled_step, layout_of, placed_state
from jepax.trackers import Trackers
from jepax.types import Images, UserError


def train(config: Config, run: Path, *, allow: Sequence[str] = ()) -> TrainState:
    """Trains in the folder `run`, or continues there, bit for bit as if nothing had interrupted it.

    `allow` names settings, or groups of them, in which the config may differ from the folder's; "data": the pictures
    too. SIGTERM and SIGINT end it after the step, saved. Raises `preemption.Preempted` then, and `UserError` where another
    process is in the folder, where it holds a run of another config or other data, or no checkpoint of it is sound,
    where a checkpoint cannot be written, and where training diverges.
    """
    with ExitStack() as held:
        this = Run(config, run)
        with multihost.collective_errors():
            if multihost.is_main_process():
                held.enter_context(lock.run_lock(run))
        with multihost.collective_errors():
            lock.check_shared_filesystem(run)
        this.claim(allow)
        held.enter_context(preemption.defer())
        while True:
            try:
                return this.go_on()
            except RollBack as leap:
                this.go_back(leap.step)
            except NotFinite as end:
                diverged = this.ended(end)
                with multihost.collective_errors():  # each has written its part
                    raise diverged from end


class Run:
    """A run's state, where it stands, and what stays the same from its first step to its last."""

    def __init__(self, config: Config, folder: Path):
        """Builds what is built in memory; nothing is written, so that what cannot be trained leaves no folder."""
        self.config, self.folder, self.checkpoints = config, folder, folder / "checkpoints"
        with multihost.collective_errors():
            refuse_other_configs(config)
        with multihost.collective_errors():
            self.source, self.optimizer = prepare(config)
        with multihost.collective_errors():
            refuse_unequal_data(self.source)
            self.mesh = sharding.make_mesh()
            wanted = layout_of(config.train.sharding, config.train.accumulate, config.method, self.optimizer, self.mesh)
        self.layout = sharding.agreed(wanted)
        with multihost.collective_errors():
            root = sharding.replicate(jr.fold_in(jr.key(config.seed), 1), self.mesh)
            self.fixed = Fixed(
                self.optimizer, root, compute_dtype(config), config.train.guard, self.layout, config.train.log_every
            )
            self.state = self.first()
        self.events = events.Events(folder)
        self.passed: dict[int, list[int]] = {}
        """Steps at which the gradient leapt, by the step of the checkpoint that training went back to."""

    def first(self) -> TrainState:
        """The state before step 0."""
        return placed_state(self.config.method, self.optimizer, jr.key(self.config.seed), self.layout)

    def claim(self, allow: Sequence[str]) -> None:
        """Takes the folder, and what it holds, for this run."""
        with multihost.collective_errors():
            claim(self.folder, self.config, self.source, allow)
        self.restore()
        changed = record(self.folder, self.config, self.source) if multihost.is_main_process() else []
        self.events.truncate_from(self.start)
        computes = jnp.dtype(compute_dtype(self.config)).name
        if self.start and (before := self.events.last("precision", computes)) != computes:
            warn(f"{self.folder} computed in {before} before and computes in {computes} here: losses will differ")
        self.events.add(
            "resumed" if self.start else "started",
            self.start,
            devices=jax.device_count(),
            precision=computes,
            changed=changed,
        )

    def restore(self) -> None:
        """Takes the newest sound checkpoint's state, or the first one; damaged checkpoints are set aside."""
        with multihost.collective_errors():
            newest = self.newest() if multihost.is_main_process() else 0
        self.start = multihost.broadcast(newest)
        self.note = {}
        if self.start:
            self.note = checkpoint.metadata(self.checkpoints, self.start)
            like, self.state = checkpoint.to_shape_structs(self.state), None  # two states at once might be too much
            with multihost.collective_errors():
                self.state = checkpoint.restore(self.checkpoints, self.start, like, check=False)

    def newest(self) -> int:
        """The step of the newest sound checkpoint; 0 where none was finished."""
        step, corrupt = checkpoint.latest_valid(self.checkpoints)
        for other, problems in corrupt.items():
            path = checkpoint.step_dir(self.checkpoints, other)
            warn(f"checkpoint {path} is corrupt; moved to {path.name}{checkpoint.CORRUPT}: {problems[0]}")
        checkpoint.quarantine(self.checkpoints, corrupt)
        if step is None and logs.read_metrics(self.folder / logs.METRICS_FILE):
            warn(f"{self.folder} was begun, but no checkpoint was finished: it begins again at step 0")
        return step or 0

    def go_on(self) -> TrainState:
        """for batch: step -> look -> log -> save, to the last step, or until the process is asked to end."""
        config, steps = self.config, self.optimizer.total_steps
        written = [self.folder / name for name in (logs.METRICS_FILE, events.EVENTS_FILE, corrupt_file())]
        with (
            Log(self.folder / logs.METRICS_FILE, steps=steps, start=self.start) as log,
            CheckpointManager(self.checkpoints, config.train.save, log.print, written) as saver,
            Trackers(
                config.train.trackers if multihost.is_main_process() else (),
                self.folder,
                configs.to_dict(config),
                log.print,
            ) as trackers,
            closing(self.read(log.print)) as stream,
        ):
            log.print_header(self.folder, config.train.batch_size, str(self.layout))
            monitor = self.monitor = Monitor(config, self.folder, log, self.events, self.note, trackers.send)
            monitor.online, agreement = online_of(config, self.source, steps), multihost.CollectiveFlag(self.mesh)
            for step, images in enumerate(stream, self.start):
                moved = movement.since(self.state.method, step) if monitor.writes(step) else None
                self.state, metrics = compiled_step(self.fixed, sharding.shard_batch(images, self.mesh), self.state)
                metrics |= moved(self.state.method, metrics["verdict"]) if moved else {}
                stop, late = agreement(
                    preemption.stop_requested(), multihost.is_main_process() and saver.timer_expired()
                )
                monitor.took(step, metrics, images)  # looks at the step before: the device never waits for it
                if step == self.start:
                    log.report_compile_time(metrics["loss"])
                    trim_heap()  # of compiling
                best = monitor.writes(step) and monitor.line(step, metrics, self.state.method)
                if best or stop or late or saver.should_save(step + 1) or step + 1 == steps:
                    monitor.settle()
                    monitor.refuse_not_finite(step, self.state.method)
                    saver.save(step + 1, self.state, monitor.note(best) | {"shift": self.shift})
                log.set_progress(step)
                if stop:
                    saver.wait()
                    raise preemption.Preempted(
                        f"asked to end: step {step + 1} of {steps} is saved; the same command goes on"
                    )
        return self.state

    @property
    def shift(self) -> int:
        """Batches that the order of examples is ahead of the steps: those that training went back over."""
        return self.note.get("shift", 0) + sum(leap - self.start + 1 for leap in self.passed.get(self.start, ()))

    def read(self, say: Callable[[str], None]) -> Generator[Images, None, None]:
        """This host's slices of the batches that are left."""
        path = self.folder / corrupt_file(jax.process_index())
        if not multihost.is_main_process():  # whose log is silent
            say = lambda text: warn(text.removeprefix("warning: "))  # noqa: E731
        broken = CorruptLog(self.source, path, self.config.data.broken_share, say)
        return read(self.config, self.source, self.optimizer.total_steps, self.start, self.shift, broken)

    def go_back(self, leap: int) -> None:
        """To the newest checkpoint, behind the step at which the gradient leapt; the examples up to it are not seen
        again. Raises `Diverged` where that has not helped for as many times as the guard has patience."""
        self.state = self.first()
        self.restore()
        self.events.truncate_from(self.start, keep=guard.NAMES[guard.ROLL_BACK])
        leaps = self.passed.setdefault(self.start, [])
        leaps.append(leap)
        if len(leaps) > self.config.train.guard.patience:
            raise self.monitor.ended(
                leap,
                f"gradient spikes brought training back to step {self.start} {len(leaps)} times: it stopped;\n"
                "try a lower optim.peak_lr, a longer optim.warmup_epochs, or train.guard.spike=clip",
            )

    def ended(self, end: NotFinite) -> Diverged:
        """What ends a run whose steps are not finite; the last of them is written down."""
        folder = dump.write(self.folder, self.state, end, self.config, self.optimizer)
        return self.monitor.ended(
            end.step,
            f"{self.config.train.guard.patience} steps in a row, up to step {end.step}, were not finite: training"
            " stopped;\n"
            f"jepax replay {folder} takes that step again; try a lower optim.peak_lr, a longer optim.warmup_epochs,"
            " or optim.clip=1.0",
        )


def read(
    config: Config, source: Source, steps: int, start: int, shift: int = 0, broken: OnCorrupt | None = None
) -> Generator[Images, None, None]:
    """This host's slices of the batches of steps `start` to `steps` - 1, taken `shift` batches further on."""
    return batches(
        source,
        batch_size=config.train.batch_size,
        steps=steps + shift,
        start=start + shift,
        seed=config.seed,
        threads=config.data.threads,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        on_corrupt=broken,
    )


def refuse_other_configs(config: Config) -> None:
    """Raises `UserError` where the processes of a run were not given the same config."""
    texts = multihost.all_gather_str(configs.text(config))
    for process, text in enumerate(texts):
        if text != texts[0]:
            line = next(a for a, b in zip(text.splitlines(), texts[0].splitlines(), strict=False) if a != b)
            raise UserError(f"process {process} was given another config than process 0: {line.strip()}")
