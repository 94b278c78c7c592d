"""`jepax doctor RUN`: what a run's folder holds, what of it is sound, and what the next command would do."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jepax import checkpoint, lock, logs, settings
from jepax import config as configs
from jepax import events as happened
from jepax.data import Source, broken, open_source
from jepax.evals import alarms
from jepax.settings import Config
from jepax.types import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """What the checkpoints are good for."""

    newest: int | None
    """The step of the newest sound one."""
    damaged: tuple[int, ...]
    """Steps of those that are not sound."""
    unread: tuple[int, ...] = ()
    """Steps of those that cannot be read, such as for a failing disk; -1 for the folder itself."""

    @property
    def readable(self) -> bool:
        """Whether the next command can read what it wants to: from the newest on until one is sound."""
        return not self.unread or (self.newest is not None and max(self.unread) < self.newest)

    @property
    def aside(self) -> bool:
        """Whether the next command will set damaged ones aside: it looks no further than the newest sound one."""
        return self.newest is not None and max(self.damaged, default=-1) > self.newest


def examine(run: Path, say: Say = print) -> bool:
    """Says what is there, and returns whether all of it is sound. Changes nothing; opens no picture.

    Raises `UserError` where the folder holds no run.
    """
    if not (run / settings.CONFIG).is_file():
        raise UserError(f"{run} holds no {settings.CONFIG}: no run was begun there, or it is the wrong folder")
    config = configs.load(Config, run / settings.CONFIG)
    say(f"run           {config.recipe}, seed {config.seed}, {type(config.method).__name__.removesuffix('Config')}")
    busy = lock.is_held(run)
    say(f"in use        {f'yes, by {lock.holder(run)}' if busy else 'no'}")
    source, data_sound = data(run, config, say)
    saved = checkpoints(run, busy, say)
    log_sound = log(run, say)
    history(run, say)
    total = settings.total_steps(config, len(source)) if source is not None else config.train.steps
    results = sorted(path.name for path in (run / "evals").glob("*.json"))
    say(f"evaluations   {', '.join(results) or 'none'}")
    healthy = health(run, say)
    say(f"next          {next_command(run, busy, saved, data_sound, total, bool(results))}")
    return not saved.unread and not saved.damaged and log_sound and data_sound and healthy


def data(run: Path, config: Config, say: Say) -> tuple[Source | None, bool]:
    """The training pictures as they are now, and whether they are those that the run began with."""
    try:
        source = open_source(config.data, "train")
        settings.refuse_other_data(run, source)
        settings.check_splits(config.data)
    except (UserError, OSError) as error:
        say(f"data          {' '.join(str(error).split())}")
        return None, False
    begun = "as when the run began" if (run / settings.DATA).exists() else "no record of them in the run"
    say(f"data          {config.data.source}, {len(source)} training pictures, {begun}")
    return source, True


def checkpoints(run: Path, busy: bool, say: Say) -> Saved:
    """Reads every file of every checkpoint."""
    folder, sound, damaged, unread = run / "checkpoints", [], [], []
    try:
        for step in checkpoint.steps(folder):
            try:
                found = checkpoint.problems(folder, step)
            except FileNotFoundError:
                found = ["a file is missing"]
            except OSError as error:
                say(f"checkpoint    {step:08d} cannot be read: {error.strerror}: {error.filename}")
                unread.append(step)
                continue
            if found and step not in checkpoint.steps(folder):
                continue  # the run that is going on has removed it meanwhile
            say(f"checkpoint    {step:08d} {f'DAMAGED: {found[0]} ({len(found)} in all)' if found else 'sound'}")
            (damaged if found else sound).append(step)
        unfinished = checkpoint.unfinished(folder)
    except OSError as error:
        say(f"checkpoint    cannot be read: {error.strerror}: {error.filename}")
        return Saved(None, (), (-1,))
    for path in unfinished:
        state = "being written" if busy else "its writing was cut off; the next one that is written removes it"
        say(f"checkpoint    {path.name}: {state}")
    for path in sorted(folder.glob(f"*{checkpoint.DAMAGED}*")):
        say(f"checkpoint    {path.name}: damaged, set aside when the run went on; it may be removed")
    if not sound:
        say(f"checkpoint    {'none that is sound' if damaged else 'none yet'}")
    return Saved(max(sound, default=None), tuple(damaged), tuple(unread))


def log(run: Path, say: Say) -> bool:
    """Whether every line of the log can be read."""
    path = run / logs.FILE
    if not path.exists():
        say("metrics       none yet")
        return True
    lines, torn = logs.read(path), happened.torn(path)
    last = f", the last of step {lines[-1]['step']}" if lines else ""
    say(f"metrics       {len(lines)} lines{last}{f'; {torn} TORN, left out by the next command' if torn else ''}")
    return not torn


def history(run: Path, say: Say) -> None:
    """What happened beside the metrics."""
    counts = Counter(str(line.get("event")) for line in happened.read(run / happened.FILE))
    say(f"events        {', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}")
    if found := broken.listed(run):
        example, where = next(iter(found)), broken.place(run)
        say(f"pictures      {len(found)} cannot be read, such as {example}; listed in {where}")
    for path in sorted((run / "dumps").glob("step_*")):
        say(f"dump          jepax replay {path}")


def health(run: Path, say: Say) -> bool:
    """Whether health.json can be read: what the watchdog said, and why training stopped where it did not finish."""
    try:
        said, ended = alarms.summary(run).removeprefix("health: "), alarms.ended(run)
    except UserError as error:
        say(f"health        {error}")
        return False
    say(f"health        {said}{f'; stopped: {ended}' if ended else ''}")
    return True


def next_command(run: Path, busy: bool, saved: Saved, data_sound: bool, total: int | None, evaluated: bool) -> str:
    """What `jepax train` on this folder would do."""
    command = f"jepax train {run / settings.CONFIG} --run-dir {run}"
    if busy:
        return "refused while the folder is in use"
    if not data_sound:
        return "refused: the data is missing, or is not the run's"
    if not saved.readable:
        return "refused: the checkpoints cannot be read"
    if saved.newest is None:
        return "refused: no checkpoint is sound" if saved.damaged else f"{command}: begins at step 0"
    aside = ", the damaged ones after it set aside" if saved.aside else ""
    if total is not None and saved.newest >= total:
        return f"{command}: nothing is left to train; {'evaluates it again' if evaluated else 'evaluates it'}{aside}"
    return f"{command}: goes on after step {saved.newest} of {total or 'its steps'}{aside}"
