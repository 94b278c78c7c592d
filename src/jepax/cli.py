"""The command line. Errors of the user end in plain lines and exit code 2."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jepax.commands import COMMANDS
from jepax.distributed import preemption
from jepax.distributed.compile_cache import SlowCompilations, enable_compile_cache
from jepax.distributed.malloc import run_cpu_synchronously, tune_malloc
from jepax.errors import CUDA_INSTALL, UserError, user_message
from jepax.io.config_yaml import suggest

MAX_ERROR_LINES = 5
"""Longest message of an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 2 after an error of the user, with `preemption.EXIT_RETRY` if stopped on request."""
    escape_unprintable()
    try:
        with preemption.install_handlers(), format_warnings():
            run_command(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        # Objects that it caught in their constructor, such as Grain's iterators, would complain when they are deleted.
        sys.unraisablehook = lambda _: None
        exit_with("stopped on request; rerun the same command to resume", preemption.EXIT_RETRY)
    except preemption.Preempted as ended:
        exit_with(str(ended), preemption.EXIT_RETRY)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        if (message := user_message(error)) is None:
            raise
        exit_with(message, 2)


def run_command(argv: list[str]) -> None:
    """Run the command that the first word names."""
    name, arguments = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        print_commands()
        return
    # Before jax is imported: it reads its settings then, and starts threads.
    silence_libraries()
    tune_malloc()
    enable_compile_cache()
    if name == "--version":
        print_version(arguments)
        return
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {suggest(name, COMMANDS)}")
    command = COMMANDS[name].read(name, arguments)
    if command is not None:
        run_cpu_synchronously()
        with slow_compilations():
            command.run()


@contextlib.contextmanager
def slow_compilations() -> Iterator[None]:
    """Within, programs that take long to compile are named on stderr."""
    import jax

    listener = SlowCompilations(lambda text: print(text, file=sys.stderr))
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def print_commands() -> None:
    """Print a line for each command."""
    print("usage: jepax COMMAND [ARGUMENT ...] [--OPTION VALUE ...]\n")
    for name, command in COMMANDS.items():
        print(f"  {name:<11} {(command.__doc__ or '').splitlines()[0]}")
    print(
        "\njepax COMMAND --help lists the options of a command, jepax train RECIPE --help every field of a recipe;\n"
        "jepax --version prints versions and devices."
    )


def print_version(arguments: Sequence[str]) -> None:
    """Print versions and devices."""
    if arguments:
        raise UserError(f"jepax --version takes no arguments, but was given {' '.join(arguments)}")
    import jax

    import jepax

    print(f"jepax {jepax.__version__}, jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")


def exit_with(message: str, code: int) -> NoReturn:
    """Print a few plain lines to stderr, and exit."""
    lines = [line for line in f"jepax: {message}".splitlines() if line.strip()]
    print("\n".join(lines[:MAX_ERROR_LINES]), file=sys.stderr)
    sys.exit(code)


def escape_unprintable() -> None:
    """Print what the terminal's encoding lacks, and file names that are not UTF-8, with escapes such as \\xb1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence_libraries() -> None:
    """Keep the libraries' log lines off the terminal; `main` prints the errors that they raise."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # One of jax's log lines must be seen: a GPU that is not used.
    devices = logging.getLogger("jax._src.xla_bridge")
    devices.setLevel(logging.WARNING)
    if warn_of_unused_gpu not in devices.filters:
        devices.addFilter(warn_of_unused_gpu)


def warn_of_unused_gpu(record: logging.LogRecord) -> bool:
    """Print one line in place of jax's log line on a GPU that it cannot use; a filter that drops all below errors."""
    if "NVIDIA GPU may be present" in record.getMessage():
        print(f"jepax: warning: the NVIDIA GPU here is not used; install {CUDA_INSTALL}", file=sys.stderr)
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def format_warnings() -> Iterator[None]:
    """Within, each warning is printed once, as one line on stderr."""
    printed, stream = set(), sys.stderr  # the stream of now: parsing redirects it for a while

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in printed:
            printed.add(str(message))
            print(f"jepax: warning: {' '.join(str(message).split())}", file=stream)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    main()
