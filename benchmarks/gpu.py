"""Everything that is to be known about speed on a GPU, in one call; each measurement in a process of its own.

    python benchmarks/gpu.py [--minutes 9] [--quick] --json benchmarks/results/NAME.json

`jepax bench` of I-JEPA's ImageNet recipes: batch 128 against PyTorch, where it is installed, scanned and unrolled, with
and without rematerialisation, and the largest batch that fits; then attention by XLA and by cuDNN at the recipes'
shapes. The file is written after each, so what a limit of time cuts off is the rest alone. See README.md beside this
file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RECIPES = ("ijepa_vitb16_in1k", "ijepa_vitl16_in1k", "ijepa_vith14_in1k")
DATA = "--data.source synthetic --data.canvas 256 --data.synthetic-images 4096 --data.threads 8".split()
QUICK = """
    --data.canvas 28 --data.synthetic-images 64 --method.encoder.width 24 --method.encoder.depth 2
    --method.encoder.heads 2 --method.predictor.width 12 --method.predictor.depth 2 --method.predictor.heads 2
    --method.encoder.patch-size 4 --method.crop.size 28 28 --method.masks.context 12 --train.steps 100
    --optim.warmup-epochs 0.1 --train.precision float32
""".split()
LARGER = (1024, 512, 256)
"""Batches beyond 128, tried from the largest on."""


def executed(scan: bool, remat: str) -> list[str]:
    """How the blocks of both networks run."""
    words = []
    for network in ("encoder", "predictor"):
        words += [f"--method.{network}.scan={scan}", f"--method.{network}.remat={remat}"]
    return words


def cases() -> Iterator[tuple[str, str, int, list[str]]]:
    """Name, recipe, batch and further words of each measurement, the most telling first."""
    for recipe in RECIPES:
        yield f"{recipe}, 128", recipe, 128, ["--peer", "torch"] if find_spec("torch") else []
    for recipe in RECIPES:
        for scan, remat in ((False, "none"), (True, "dots"), (True, "full")):
            yield f"{recipe}, 128, scan {scan}, remat {remat}", recipe, 128, executed(scan, remat)
    for recipe in RECIPES:
        for batch in LARGER:
            yield f"{recipe}, {batch}", recipe, batch, []


def measured(recipe: str, batch: int, words: list[str], seconds: float, quick: bool) -> dict[str, Any]:
    """What `jepax bench` finds, or the end of what it said where it fails."""
    batch = min(batch, 8) if quick else batch
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        own = ["--json", str(found), "--train.batch-size", str(batch), "--rounds", "2" if quick else "20"]
        command = [sys.executable, "-m", "jepax.cli", "bench", recipe, *DATA, *(QUICK if quick else []), *own, *words]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
        if ended.returncode:
            return {"failed": ended.stderr[-1000:]}
        print(ended.stdout.splitlines()[0] if not ended.stdout else ended.stdout, flush=True)
        return json.loads(found.read_text())


SHAPES = {"B/16": (12, 196, 64), "L/16": (16, 196, 64), "H/14": (16, 256, 80), "context of B/16": (12, 50, 64)}
"""Heads, tokens and channels of attention."""
ATTENTION = """
import json, sys
import jax, jax.numpy as jnp
from jepax.bench.clock import in_turn
from jepax.nn.operations import attend
import numpy as np
batch, heads, tokens, channels = map(int, sys.argv[1:])
compute = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (batch, tokens, heads, channels), compute) for key in keys)
def ours(q, k, v):
    return attend(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v))).reshape(q.shape)
forms = {"ours": ours, "xla": lambda *x: jax.nn.dot_product_attention(*x, implementation="xla")}
if jax.default_backend() == "gpu":
    forms["cudnn"] = lambda *x: jax.nn.dot_product_attention(*x, implementation="cudnn")
calls = {}
for name, form in forms.items():
    forward = jax.jit(form)
    both = jax.jit(jax.grad(lambda *x, form=form: jnp.sum(form(*x).astype(jnp.float32) ** 2), argnums=(0, 1, 2)))
    calls[f"{name}, forward"] = lambda f=forward: f(q, k, v)
    calls[f"{name}, both"] = lambda f=both: f(q, k, v)
print(json.dumps({name: float(np.median(times)) for name, times in in_turn(calls, 20).items()}))
"""


def attention(batch: int) -> dict[str, Any]:
    """Median seconds of attention by ours, XLA's and cuDNN's, forward and with its gradient."""
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        command = [sys.executable, "-c", ATTENTION, str(batch), *map(str, shape)]
        ended = subprocess.run(command, capture_output=True, text=True)
        found[name] = json.loads(ended.stdout) if not ended.returncode else {"failed": ended.stderr[-1000:]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="what is not begun by then is left out (9)")
    parser.add_argument("--quick", action="store_true", help="tiny networks: only to see that it runs, also on a CPU")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jepax-"))
    end, fits, results = time.monotonic() + 60 * args.minutes, set(), {}
    todo = list(cases())[: 2 if args.quick else None]
    for number, (name, recipe, batch, words) in enumerate(todo):
        left = end - time.monotonic()
        if left < 30 or recipe in fits:
            continue
        results[name] = measured(recipe, batch, words, left, args.quick)
        if batch > 128 and "failed" not in results[name]:
            fits.add(recipe)  # the largest that fits
        print(f"{name}: {results[name].get('failed') or results[name]['utilisation']}", flush=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        if number == len(RECIPES) - 1 or args.quick:
            results["attention"] = attention(2 if args.quick else 128)
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
