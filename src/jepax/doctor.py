"""`jepax doctor RUN`: what a run's folder holds, what of it is sound, and what the next command would do."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from jepax import checkpoint, lock, settings
from jepax import config as configs
from jepax import events as happened
from jepax.data import BROKEN, Source, open_source
from jepax.evals import alarms
from jepax.settings import Config
from jepax.types import UserError

Say = Callable[[str], None]


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
    newest, sound = checkpoints(run, say)
    log_sound = log(run, say)
    history(run, say)
    total = settings.total_steps(config, len(source)) if source is not None else config.train.steps
    results = sorted(path.name for path in (run / "evals").glob("*.json"))
    say(f"evaluations   {', '.join(results) or 'none'}")
    say(f"health        {alarms.summary(run).removeprefix('health: ')}")
    say(f"next          {next_command(run, busy, newest, sound, data_sound, total, bool(results))}")
    return sound and log_sound and data_sound


def data(run: Path, config: Config, say: Say) -> tuple[Source | None, bool]:
    """The training pictures as they are now, and whether they are those that the run began with."""
    try:
        source = open_source(config.data, "train")
        settings.refuse_other_data(run, source)
    except UserError as error:
        say(f"data          {' '.join(str(error).split())}")
        return None, False
    begun = "as when the run began" if (run / settings.DATA).exists() else "no record of them in the run"
    say(f"data          {config.data.source}, {len(source)} training pictures, {begun}")
    return source, True


def checkpoints(run: Path, say: Say) -> tuple[int | None, bool]:
    """The newest sound checkpoint's step, and whether every finished one is sound. Every file is read."""
    folder, newest, sound = run / "checkpoints", None, True
    for step in checkpoint.steps(folder):
        found = checkpoint.problems(folder / f"{step:08d}")
        say(f"checkpoint    {step:08d} {f'DAMAGED: {found[0]} ({len(found)} in all)' if found else 'sound'}")
        newest, sound = (newest if found else step), sound and not found
    for path in checkpoint.unfinished(folder):
        say(f"checkpoint    {path.name}: its writing was cut off; the next one that is written removes it")
    for path in sorted(folder.glob(f"*{checkpoint.DAMAGED}*")):
        say(f"checkpoint    {path.name}: damaged, set aside when the run went on; it may be removed")
    if newest is None:
        say("checkpoint    none that is sound")
    return newest, sound


def log(run: Path, say: Say) -> bool:
    """Whether every line of the log can be read."""
    path = run / "metrics.jsonl"
    if not path.exists():
        say("metrics       none yet")
        return True
    lines, torn = happened.read(path), happened.torn(path)
    last = f", the last of step {lines[-1]['step']}" if lines else ""
    say(f"metrics       {len(lines)} lines{last}{f'; {torn} TORN, left out by the next command' if torn else ''}")
    return not torn


def history(run: Path, say: Say) -> None:
    """What happened beside the metrics."""
    counts = Counter(line["event"] for line in happened.read(run / happened.FILE))
    say(f"events        {', '.join(f'{name} {count}' for name, count in counts.items()) or 'none'}")
    broken = happened.read(run / BROKEN)
    if broken:
        say(f"pictures      {len(broken)} cannot be read, such as {broken[0].get('file')}; {run / BROKEN} lists them")
    for path in sorted((run / "dumps").glob("step_*")):
        say(f"dump          jepax replay {path}")


def next_command(
    run: Path, busy: bool, newest: int | None, sound: bool, data_sound: bool, total: int | None, evaluated: bool
) -> str:
    """What `jepax train` on this folder would do."""
    command = f"jepax train {run / settings.CONFIG} --run-dir {run}"
    if busy:
        return "refused while the folder is in use"
    if not data_sound:
        return "refused: the data is missing, or is not the run's"
    if newest is None:
        return f"{command}: begins at step 0" if sound else "refused: no checkpoint is sound"
    if newest == total:
        return f"{command}: nothing is left to train; {'evaluates it again' if evaluated else 'evaluates it'}"
    aside = "" if sound else ", the damaged ones set aside"
    return f"{command}: goes on after step {newest} of {total or 'its steps'}{aside}"
