"""`jepax doctor RUN`: prints what is in a run's folder, what of it is valid, and what the next command would do."""

import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from jepax.data import ImageSource, Source, corrupt, open_source
from jepax.health import alerts
from jepax.io import checkpoint, events, lock, logger
from jepax.io import config_yaml as configs
from jepax.training.config import (
    CONFIG_FILE,
    DATA_FILE,
    Config,
    check_eval_splits,
    check_same_data,
    compute_total_steps,
)
from jepax.types import UserError

PrintRow = Callable[[str, str], None]
"""Prints a name and a text."""


def inspect_run(run: Path, print: Callable[[str], None] = print) -> bool:
    """Print what is in the folder, and return True if all of it is valid. Changes nothing; opens no image.

    Raises `UserError` if the folder has no run.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} has no {CONFIG_FILE}: no run was started there, or it is the wrong folder")

    def row(name: str, text: str) -> None:
        print(f"{name:<14}{text}")

    config = configs.load(Config, run / CONFIG_FILE)
    row("run", f"{config.recipe}, seed {config.seed}, {type(config.method).__name__.removesuffix('Config')}")
    locked = lock.is_locked(run)
    row("in use", f"yes, by {lock.owner(run)}" if locked else "no")

    source = print_data(run, config, row)
    checkpoints = print_checkpoints(run, locked, row)
    log_valid = print_log(run, row)
    print_events(run, row)
    results = sorted(path.name for path in (run / "evals").glob("*.json"))
    row("evaluations", ", ".join(results) or "none")
    health_valid = print_health(run, row)

    if locked:
        row("next", "refused while the folder is in use")
    elif source is None:
        row("next", "refused: the data is missing, or is not the run's")
    else:
        row("next", describe_next_command(run, checkpoints, compute_total_steps(config, len(source)), bool(results)))
    return log_valid and health_valid and source is not None and set(checkpoints.values()) <= {"ok"}


def print_data(run: Path, config: Config, row: PrintRow) -> Source | None:
    """Open the training data as it is now; None if it is not the data that the run began with."""
    try:
        source = open_source(config.data, "train")
        check_same_data(run, source)
        check_eval_splits(config.data)
    except (UserError, OSError) as error:
        row("data", " ".join(str(error).split()))
        return None
    same = "as when the run began" if (run / DATA_FILE).exists() else "not recorded in the run"
    kind = "images" if isinstance(source, ImageSource) else "clips"
    row("data", f"{config.data.dataset}, {len(source)} training {kind}, {same}")
    return source


def print_checkpoints(run: Path, locked: bool, row: PrintRow) -> dict[int, str]:
    """Read every file of every checkpoint. Returns "ok", "corrupt" or "unreadable" by step (-1: the folder itself)."""
    folder, states = run / "checkpoints", {}
    try:
        for step in checkpoint.list_steps(folder):
            state, text = verify_checkpoint(folder, step)
            if state == "corrupt" and step not in checkpoint.list_steps(folder):
                continue  # a run that is in progress has just removed it
            states[step] = state
            row("checkpoint", f"{step:08d} {text}")
    except OSError as error:
        row("checkpoint", f"cannot be read: {error.strerror}: {error.filename}")
        return {-1: "unreadable"}

    for path in checkpoint.partial_checkpoints(folder):
        row("checkpoint", f"{path.name}: {'being written' if locked else 'never finished; the next save removes it'}")
    for path in sorted(folder.glob(f"*{checkpoint.CORRUPT}*")):
        row("checkpoint", f"{path.name}: corrupt, renamed when the run was resumed; it may be removed")
    if "ok" not in states.values():
        row("checkpoint", "none is valid" if "corrupt" in states.values() else "none yet")
    return states


def verify_checkpoint(folder: Path, step: int) -> tuple[str, str]:
    """The checkpoint's state, and the same in words."""
    try:
        problems = checkpoint.verify(folder, step)
    except FileNotFoundError:
        problems = ["a file is missing"]
    except OSError as error:
        return "unreadable", f"cannot be read: {error.strerror}: {error.filename}"
    return ("corrupt", f"CORRUPT: {problems[0]} ({len(problems)} in all)") if problems else ("ok", "ok")


def print_log(run: Path, row: PrintRow) -> bool:
    """Return True if every line of metrics.jsonl can be read."""
    path = run / logger.METRICS_FILE
    records, num_corrupt = logger.read_metrics(path), events.count_corrupt_lines(path)
    last = f", the last of step {records[-1]['step']}" if records else ""
    dropped = f"; {num_corrupt} CORRUPT, dropped by the next command" if num_corrupt else ""
    row("metrics", f"{len(records)} lines{last}{dropped}" if path.exists() else "none yet")
    return not num_corrupt


def print_events(run: Path, row: PrintRow) -> None:
    """Count the events, and name corrupt images and dumps."""
    counts = Counter(str(record.get("event")) for record in events.read_jsonl(run / events.EVENTS_FILE))
    row("events", ", ".join(f"{name} {count}" for name, count in counts.items()) or "none")
    if found := corrupt.read_lists(run):
        listed = corrupt.describe_lists(run)
        row("images", f"{len(found)} corrupt, such as {next(iter(found))}; listed in {listed}")
    for path in sorted((run / "dumps").glob("step_*")):
        row("dump", f"jepax replay {path}")


def print_health(run: Path, row: PrintRow) -> bool:
    """Print the watchdog's alarms, and why training stopped; returns True if health.json can be read."""
    try:
        summary, ended = alerts.summarize_alerts(run).removeprefix("health: "), alerts.load_stop_reason(run)
    except UserError as error:
        row("health", str(error))
        return False
    row("health", f"{summary}{f'; stopped: {ended}' if ended else ''}")
    return True


def describe_next_command(run: Path, checkpoints: dict[int, str], total_steps: int, evaluated: bool) -> str:
    """Describe what `jepax train` on this folder would do."""
    command = shlex.join(["jepax", "train", str(run / CONFIG_FILE), "--run-dir", str(run)])
    # It looks for the newest valid checkpoint, and meets those that are newer.
    newest = max((step for step, state in checkpoints.items() if state == "ok"), default=None)
    newer = {state for step, state in checkpoints.items() if newest is None or step > newest}
    if "unreadable" in newer:
        return "refused: the checkpoints cannot be read"
    if newest is None:
        return "refused: no checkpoint is valid" if newer else f"{command}: begins at step 0"
    moved = ", the corrupt ones after it renamed" if newer else ""
    if newest >= total_steps:
        return f"{command}: nothing is left to train; {'evaluates it again' if evaluated else 'evaluates it'}{moved}"
    return f"{command}: resumes after step {newest} of {total_steps}{moved}"
