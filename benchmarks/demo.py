"""Times a whole command from an empty compilation cache, and again from a full one, with the seconds of each program.

    python benchmarks/demo.py                                         # jepax train ijepa_fashion_mnist
    python benchmarks/demo.py --json FILE --src OTHER/src             # the same command of another checkout
    python benchmarks/demo.py --quick                                 # 20 steps, to check that it runs
    python benchmarks/demo.py -- train RECIPE --optim.peak-lr 3e-4    # another command

The command runs in a process of its own, with its run folder and its cache in a temporary folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jepax.bench.machine import describe_machine

SRC = Path(__file__).parents[1] / "src"
DEMO, QUICK = ["train", "ijepa_fashion_mnist"], ["--train.steps", "20", "--eval.linear.epochs", "2"]
CHILD = """
import json, sys
import jax
from jepax import cli
compiled = []
def listener(event, seconds, **metadata):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append([metadata.get("fun_name"), round(seconds, 3)])
jax.monitoring.register_event_duration_secs_listener(listener)
try:
    cli.main(sys.argv[2:])
finally:
    open(sys.argv[1], "w").write(json.dumps(compiled))
"""


def run(words: list[str], src: Path, folder: Path, name: str) -> dict[str, Any]:
    """Seconds of the command, the lines that it printed with their seconds, and the programs, slowest first."""
    programs, command = folder / f"{name}.json", [*words, "--run-dir", str(folder / name)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    child = [sys.executable, "-uc", CHILD, str(programs), *command]
    environment = os.environ | cache | {"PYTHONPATH": str(src)}
    start, lines = time.perf_counter(), []
    with subprocess.Popen(child, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append([round(time.perf_counter() - start, 1), line.rstrip()])
            print(f"{lines[-1][0]:>7.1f} s  {line}", end="", file=sys.stderr)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"the command failed with exit code {process.returncode}")
    found = sorted(json.loads(programs.read_text()), key=lambda program: -program[1])
    return {
        "seconds": round(seconds, 1),
        "programs": len(found),
        "compile_s": round(sum(took for _, took in found), 1),
        "slowest": found[:25],
        "lines": lines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--src", type=Path, default=SRC)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("words", nargs="*", default=DEMO)
    options = parser.parse_args()
    words = options.words + QUICK * options.quick
    with tempfile.TemporaryDirectory() as folder:
        times = {name: run(words, options.src.absolute(), Path(folder), name) for name in ("cold", "warm")}
    for name, found in times.items():
        print(f"{name}: {found['seconds']} s, {found['compile_s']} s of them for {found['programs']} programs")
    if options.json:
        described = {"what": f"jepax {' '.join(words)}", "machine": describe_machine(), **times}
        options.json.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
