"""The command line: `jepax train` and the other words of USAGE. Errors of the user end in plain lines, code 2."""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jepax.distributed import preemption
from jepax.distributed.compile_cache import enable_compile_cache
from jepax.distributed.malloc import run_cpu_synchronously, tune_malloc

if TYPE_CHECKING:  # jax and what stands on it take seconds to import: only where a command needs them
    from jepax.evaluation import Subject
    from jepax.settings import Config
    from jepax.step import TrainState

USAGE = """usage: jepax COMMAND

  jepax recipes                 lists the recipes and the grids
  jepax train RECIPE            trains a recipe, evaluates it, draws its figures
  jepax train CONFIG.yaml       trains the run of a config file, such as runs/NAME/config.yaml, again
      --FIELD.PATH VALUE ...    overrides any field: --optim.peak-lr 3e-4 --method.crop.size 28 28
      --run-dir DIR             folder of the run (runs/RECIPE); the same command again continues it
      --resume.allow NAME ...   continues a folder of another config: settings or groups that may differ; data: pictures
      --distributed             one of several processes, on one host or many: docs/many_hosts.md
      --dry-run                 prints settings, sizes, arithmetic and memory, and takes one step; writes nothing
  jepax train RECIPE --help     lists every field with its type, default and meaning
  jepax evaluate RUN|WEIGHTS    evaluates the newest checkpoint of a run's folder, or exported weights
      --protocols NAME ...      linear, linear_published, knn, logistic, low_shot, attentive, finetune
      --step N                  another checkpoint
      --encoder target|context  another encoder than the method's default;  --pool mean|sum;  --seed N
      --data.FIELD VALUE        other data, such as --data.source image_folder --data.root DIR
      --eval.FIELD.PATH VALUE   any setting of a protocol;  --run-dir DIR: where evals/ is written
  jepax export RUN FOLDER       writes the newest checkpoint's encoder as a Hugging Face I-JEPA folder, for transformers
      --step N                  the checkpoint of another step
      --encoder NAME            target or context; by default the one that evaluations read
  jepax doctor RUN              says what a run's folder holds, what is sound, and what the next command would do
  jepax replay DUMP             takes a step again that ended a run, from its folder in runs/NAME/dumps
  jepax bench RECIPE            how fast a step is here, by part, against the machine's peak: one table
  jepax bench data RECIPE       pictures read per second and core, against Pillow, and what the step asks for
      --peer torch              against plain PyTorch's I-JEPA at the same shapes, eager and compiled
      --json FILE               the numbers;  --rounds N: timed steps (20);  --FIELD.PATH VALUE ... as for train
  jepax data pack PHOTOS PACK   packs a folder of photos into a few large files, for data.source=packed
      --canvas 512              longest side of a picture;  --quality 95;  --records 4096 in a file;  --threads N
  jepax grid NAME               trains and evaluates the rows of a grid, or of a grid's YAML file: one table, one figure
      --FIELD.PATH VALUE ...    overrides a field of every row
      --run-dir DIR             folder of the grid (runs/NAME); the same command again continues it
      --seeds 0 1 2             seeds of every row
      --part 1/2                every second run, from the first: for several processes in one folder
  jepax --version               versions and devices
"""
LINES = 5
"""Longest message of an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exits with 2 after an error of the user, with `preemption.EXIT_RETRY` when it was asked to end."""
    try:
        with preemption.install_handlers(), plain_warnings():
            run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        stop("ended as asked; the same command goes on", preemption.EXIT_RETRY)
    except preemption.Preempted as ended:
        stop(str(ended), preemption.EXIT_RETRY)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, ValueError, RuntimeError) as error:
        from jepax.types import words

        if (said := words(error)) is None:
            raise
        stop(said, 2)


def stop(message: str, code: int) -> NoReturn:
    """A few plain lines to stderr, and the end."""
    lines = [line for line in f"jepax: {message}".splitlines() if line.strip()]
    print("\n".join(lines[:LINES]), file=sys.stderr)
    sys.exit(code)


def run(argv: list[str]) -> None:
    """Hands the arguments to their command."""
    command, arguments = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help", "help") or (arguments[:1] in (["-h"], ["--help"]) and command in COMMANDS):
        print(USAGE, end="")
        return
    quiet()
    tune_malloc()
    enable_compile_cache()
    if command not in COMMANDS:
        from jepax.config import nearest
        from jepax.types import UserError

        raise UserError(f"{command!r} is no command; {nearest(command, COMMANDS)}")
    run_cpu_synchronously()
    COMMANDS[command](arguments)


def quiet() -> None:
    """Keeps the libraries' chatter off the terminal; what they raise is told by `main`, without their tracebacks."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, each warning to the user is one line on stderr, and is said once."""
    said, stream = set(), sys.stderr  # the stream of now: what parses the overrides redirects it for a while

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            print(f"jepax: warning: {' '.join(str(message).split())}", file=stream)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def recipes(arguments: list[str]) -> None:
    """`jepax recipes`"""
    nothing_but("recipes", arguments)
    from jepax.grids import GRIDS
    from jepax.recipes import RECIPES

    width = max(map(len, [*RECIPES, *GRIDS]))
    for name, function in sorted(RECIPES.items()):
        print(f"{name:<{width}}  {first_line(function)}")
    print("\ngrids")
    for name, function in sorted(GRIDS.items()):
        print(f"{name:<{width}}  {first_line(function)}")


def first_line(function: Callable[..., Any]) -> str:
    """Of its docstring."""
    return (function.__doc__ or "").strip().splitlines()[0]


def version(arguments: list[str]) -> None:
    """`jepax --version`"""
    nothing_but("--version", arguments)
    import jax

    import jepax

    print(f"jepax {jepax.__version__}, jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")


def nothing_but(command: str, arguments: list[str]) -> None:
    """Raises `UserError` at arguments of a command that takes none."""
    from jepax.types import UserError

    if arguments:
        raise UserError(f"jepax {command} takes no arguments, but was given {' '.join(arguments)}")


def train(arguments: list[str]) -> None:
    """`jepax train RECIPE|CONFIG.yaml [--field.path value ...] [--run-dir DIR] [--dry-run]`"""
    from jepax.overrides import resolve

    start = time.perf_counter()
    wanted = resolve(arguments)
    if wanted is None:  # --help was asked for, and printed
        return
    config, folder = wanted.config, wanted.run
    if wanted.dry:
        from jepax.dryrun import dry_run

        dry_run(config)
        return
    import equinox as eqx

    from jepax import lock, settings, sharding
    from jepax import train as training
    from jepax.distributed import multihost
    from jepax.evals import alarms

    if wanted.distributed:
        multihost.initialize()
    with multihost.peer_guard():
        with multihost.collective_errors():
            if config.eval.protocols:
                settings.check_splits(config.data)
        state = training.train(config, folder, allow=wanted.allow)
        state = sharding.local(eqx.tree_at(lambda s: s.opt_state, state, None))  # evaluations read the method
        multihost.shutdown()
    if not multihost.is_main_process():
        return
    with lock.run_lock(folder):
        finish(config, state, folder)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all; {alarms.summary(folder)}")


def finish(config: "Config", state: "TrainState", folder: Path) -> None:
    """Evaluates, draws, prints the table and where everything lies."""
    from jepax import evaluation
    from jepax.viz import figures

    if config.eval.protocols:
        print(show(evaluation.of_run(config, state, folder)))
    else:
        print(f"not evaluated: eval.protocols names none; jepax evaluate {folder} --protocols linear knn")
    for path in figures.draw(config, folder):
        print(path)


def show(subject: "Subject") -> Path:
    """Evaluates, prints the tables, and returns the file that holds the results. Floors are kept beside it: what was
    interrupted, and other steps of the run, need not measure them again."""
    from rich.console import Console

    from jepax import evaluation
    from jepax.evals import report
    from jepax.evals.say import Say

    results, written = evaluation.evaluate(subject, Say(), floors=subject.folder / "evals" / "floors")
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    for table in (report.table(results), report.beside(results)):
        if table is not None:
            console.print(table)
    return written


def evaluate(arguments: list[str]) -> None:
    """`jepax evaluate RUN|WEIGHTS [--step N] [--protocols ...] [--encoder ...] [--pool ...] [--data.… ] [--eval.… ]`"""
    from jepax import evaluation

    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    print(show(evaluation.resolve(arguments)))


def export(arguments: list[str]) -> None:
    """`jepax export RUN FOLDER [--step N] [--encoder target|context]`"""
    from jepax import evaluation, overrides, weights
    from jepax.types import UserError

    if len(arguments) < 2 or any(word.startswith("-") for word in arguments[:2]):
        raise UserError("give a run's folder and a new one: jepax export runs/NAME FOLDER")
    run, folder = map(Path, arguments[:2])
    given: dict[str, str] = {}
    for flag, *words in overrides.grouped(arguments[2:]):
        if flag not in ("--step", "--encoder") or flag in given or len(words) != 1:
            said = " ".join([flag, *words])
            raise UserError(f"{said} is not understood; jepax export takes --step N and --encoder NAME, each once")
        given[flag] = words[0]
    if not given.get("--step", "0").isdecimal():
        raise UserError(f"--step {given['--step']} is no number of a step; try --step 1000, or leave it out")
    config = evaluation.config_of(run)
    state = evaluation.restored(config, run, int(given["--step"]) if "--step" in given else None)
    encoders = state.method.encoders()
    name = given.get("--encoder", next(iter(encoders)))
    if name not in encoders:
        raise UserError(f"--encoder {name}: {config.method.name} has no such encoder; it has {', '.join(encoders)}")
    crop, step = config.method.crop, int(state.step)
    weights.export(folder, encoders[name], crop, recipe=config.recipe, step=step, name=name)
    print(f"{folder}: the {name} encoder after step {step}")


def doctor(arguments: list[str]) -> None:
    """`jepax doctor RUN`; exits with 1 where something is not sound."""
    from jepax.doctor import examine
    from jepax.types import UserError

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("give a run's folder: jepax doctor runs/NAME")
    if not examine(Path(arguments[0])):
        sys.exit(1)


def replay(arguments: list[str]) -> None:
    """`jepax replay DUMP`"""
    from jepax import replay as again

    again.replay(again.of_arguments(arguments))


def bench(arguments: list[str]) -> None:
    """`jepax bench RECIPE [--peer torch] [--json FILE] [--rounds N] [--field.path value ...]`"""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    if "--peer" in arguments:  # which shares an accelerator's memory with us
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jepax.bench import run

    run.bench(arguments)


def data(arguments: list[str]) -> None:
    """`jepax data pack PHOTOS PACK [--canvas N] [--quality N] [--records N] [--threads N]`"""
    from jepax import pack
    from jepax.types import UserError

    if arguments[:1] != ["pack"]:
        raise UserError("jepax data knows one word: jepax data pack PHOTOS PACK")
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    pack.pack(*pack.of_arguments(arguments[1:]))


def grid(arguments: list[str]) -> None:
    """`jepax grid NAME|GRID.yaml [--field.path value ...] [--run-dir DIR] [--seeds 0 1 2] [--part 1/2]`"""
    from jepax.grids import run as grids

    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    wanted = grids.resolve(arguments)
    written = grids.run(wanted, say=lambda line: print(line, file=sys.stderr))
    print(written[0].read_text(), end="")
    for path in written:
        print(path)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "recipes": recipes,
    "train": train,
    "evaluate": evaluate,
    "export": export,
    "doctor": doctor,
    "replay": replay,
    "grid": grid,
    "bench": bench,
    "data": data,
    "--version": version,
}

if __name__ == "__main__":
    main()
