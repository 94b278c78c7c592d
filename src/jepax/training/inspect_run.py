"""`jepax doctor RUN`: prints what is in a run's folder, what of it is valid, and what the next command would do."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jepax.data import Source, corrupt, open_source
from jepax.health import alerts
from jepax.io import checkpoint, lock, logger
from jepax.io import config_yaml as configs
from jepax.io import events as happened
from jepax.training import config as train_config
from jepax.training.config import Config
from jepax.types import UserError

Print = Callable[[str], None]


@dataclass(frozen=True)
class CheckpointStatus:
    """Steps of the newest valid checkpoint, of corrupt ones, and of those that cannot be read (-1: the folder)."""

    newest: int | None
    corrupt: tuple[int, ...]
    unreadable: tuple[int, ...] = ()

    @property
    def readable(self) -> bool:
        """True if the next command can read what it needs: from the newest on until one is valid."""
        return not self.unreadable or (self.newest is not None and max(self.unreadable) < self.newest)

    @property
    def will_quarantine(self) -> bool:
        """True if the next command meets corrupt ones before the newest valid one."""
        return self.newest is not None and max(self.corrupt, default=-1) > self.newest


def inspect_run(run: Path, print: Print = print) -> bool:
    """Prints what is in the folder, and returns True if all of it is valid. Changes nothing; opens no image.

    Raises `UserError` where the folder has no run.
    """
    if not (run / train_config.CONFIG_FILE).is_file():
        raise UserError(f"{run} holds no {train_config.CONFIG_FILE}: no run was begun there, or it is the wrong folder")
    config = configs.load(Config, run / train_config.CONFIG_FILE)
    print(f"run           {config.recipe}, seed {config.seed}, {type(config.method).__name__.removesuffix('Config')}")
    locked = lock.is_locked(run)
    print(f"in use        {f'yes, by {lock.owner(run)}' if locked else 'no'}")

    source, data_valid = print_data(run, config, print)
    status = print_checkpoints(run, locked, print)
    log_valid = print_log(run, print)
    print_events(run, print)
    results = sorted(path.name for path in (run / "evals").glob("*.json"))
    print(f"evaluations   {', '.join(results) or 'none'}")
    health_valid = print_health(run, print)

    total = train_config.compute_total_steps(config, len(source)) if source is not None else config.train.steps
    print(f"next          {describe_next_command(run, locked, status, data_valid, total, bool(results))}")
    return not status.unreadable and not status.corrupt and log_valid and data_valid and health_valid


def print_data(run: Path, config: Config, print: Print) -> tuple[Source | None, bool]:
    """Opens the training data as it is now; False if it is not the data that the run began with."""
    try:
        source = open_source(config.data, "train")
        train_config.check_same_data(run, source)
        train_config.check_eval_splits(config.data)
    except (UserError, OSError) as error:
        print(f"data          {' '.join(str(error).split())}")
        return None, False
    begun = "as when the run began" if (run / train_config.DATA_FILE).exists() else "no record of them in the run"
    print(f"data          {config.data.dataset}, {len(source)} training images, {begun}")
    return source, True


def print_checkpoints(run: Path, locked: bool, print: Print) -> CheckpointStatus:
    """Reads every file of every checkpoint."""
    folder, valid, corrupt, unreadable = run / "checkpoints", [], [], []
    try:
        for step in checkpoint.list_steps(folder):
            try:
                problems = checkpoint.verify(folder, step)
            except FileNotFoundError:
                problems = ["a file is missing"]
            except OSError as error:
                print(f"checkpoint    {step:08d} cannot be read: {error.strerror}: {error.filename}")
                unreadable.append(step)
                continue
            if problems and step not in checkpoint.list_steps(folder):
                continue  # a run that is in progress has just removed it
            print(
                f"checkpoint    {step:08d} {f'CORRUPT: {problems[0]} ({len(problems)} in all)' if problems else 'ok'}"
            )
            (corrupt if problems else valid).append(step)
        partial = checkpoint.partial_checkpoints(folder)
    except OSError as error:
        print(f"checkpoint    cannot be read: {error.strerror}: {error.filename}")
        return CheckpointStatus(None, (), (-1,))

    for path in partial:
        print(f"checkpoint    {path.name}: {'being written' if locked else 'never finished; the next save removes it'}")
    for path in sorted(folder.glob(f"*{checkpoint.CORRUPT}*")):
        print(f"checkpoint    {path.name}: corrupt, renamed when the run was resumed; it may be removed")
    if not valid:
        print(f"checkpoint    {'none is valid' if corrupt else 'none yet'}")
    return CheckpointStatus(max(valid, default=None), tuple(corrupt), tuple(unreadable))


def print_log(run: Path, print: Print) -> bool:
    """Returns True if every line of metrics.jsonl can be read."""
    path = run / logger.METRICS_FILE
    if not path.exists():
        print("metrics       none yet")
        return True
    records, corrupt = logger.read_metrics(path), happened.count_corrupt_lines(path)
    last = f", the last of step {records[-1]['step']}" if records else ""
    dropped = f"; {corrupt} CORRUPT, dropped by the next command" if corrupt else ""
    print(f"metrics       {len(records)} lines{last}{dropped}")
    return not corrupt


def print_events(run: Path, print: Print) -> None:
    """Counts the events, and names corrupt images and dumps."""
    counts = Counter(str(record.get("event")) for record in happened.read_jsonl(run / happened.EVENTS_FILE))
    print(f"events        {', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}")
    if found := corrupt.read_lists(run):
        print(
            f"images        {len(found)} corrupt, such as {next(iter(found))}; listed in {corrupt.describe_lists(run)}"
        )
    for path in sorted((run / "dumps").glob("step_*")):
        print(f"dump          jepax replay {path}")


def print_health(run: Path, print: Print) -> bool:
    """Prints the watchdog's alarms, and why training stopped; returns True if health.json can be read."""
    try:
        summary, ended = alerts.summarize_alerts(run).removeprefix("health: "), alerts.load_stop_reason(run)
    except UserError as error:
        print(f"health        {error}")
        return False
    print(f"health        {summary}{f'; stopped: {ended}' if ended else ''}")
    return True


def describe_next_command(
    run: Path, locked: bool, status: CheckpointStatus, data_valid: bool, total: int | None, evaluated: bool
) -> str:
    """Describes what `jepax train` on this folder would do."""
    command = f"jepax train {run / train_config.CONFIG_FILE} --run-dir {run}"
    if locked:
        return "refused while the folder is in use"
    if not data_valid:
        return "refused: the data is missing, or is not the run's"
    if not status.readable:
        return "refused: the checkpoints cannot be read"
    if status.newest is None:
        return "refused: no checkpoint is valid" if status.corrupt else f"{command}: begins at step 0"
    moved = ", the corrupt ones after it renamed" if status.will_quarantine else ""
    if total is not None and status.newest >= total:
        return f"{command}: nothing is left to train; {'evaluates it again' if evaluated else 'evaluates it'}{moved}"
    return f"{command}: resumes after step {status.newest} of {total or 'its steps'}{moved}"
