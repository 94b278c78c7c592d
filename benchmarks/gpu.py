"""Measure speed on a GPU in one call, each recipe in processes of its own.

    python benchmarks/gpu.py [--minutes 9] [--recipes NAME ...] [--tasks NAME ...] [--quick] --json FILE

I-JEPA's ImageNet recipes at batch 128, unrolled, against plain PyTorch, eager and compiled; at the largest batch that
fits; by part; scanned, with and without rematerialization; attention in three forms. The file is written after each
task and keeps its earlier results, so a time limit loses nothing that was measured. See README.md in this folder.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = ("ijepa_vitb16_in1k", "ijepa_vith14_in1k", "ijepa_vitl16_in1k")
TASKS = ("128", "eager", "compiled"), ("largest", "parts", "scan, dots", "scan, full", "attention")
"""In the order in which they run: the first group of all recipes, then the second. The first shares the GPU with
PyTorch."""
MEMORY = ("0.5", "0.92")
"""Fraction of a GPU's memory that is ours while each group is measured."""
DATA = "--data.dataset synthetic --data.canvas-size 256 --data.synthetic-size 4096 --data.num-threads 8".split()
QUICK = """
    --data.canvas-size 28 --data.synthetic-size 64 --method.encoder.width 24 --method.encoder.depth 2
    --method.encoder.num-heads 2 --method.predictor.width 12 --method.predictor.depth 2 --method.predictor.num-heads 2
    --method.encoder.patch-size 4 --method.crop.size 28 28 --method.masks.num-context-patches 12 --train.steps 100
    --optim.warmup-epochs 0.1 --train.compute-dtype float32
""".split()
MAX_FILLED = 0.9
"""Fraction of our memory that the largest batch may fill."""


class Case:
    """One recipe on this device, and its tasks."""

    def __init__(self, recipe: str, quick: bool):
        self.recipe, self.quick, self.rounds = recipe, quick, 2 if quick else 20
        self.batch = 8 if quick else 128

    def config(self, batch: int, scan: bool = False, remat: str = "none") -> Any:
        """The recipe's config at this batch size, its blocks executed in this way."""
        from jepax.commands.bench import Bench

        words = [*DATA, *(QUICK if self.quick else []), "--train.batch-size", str(batch)]
        for network in ("encoder", "predictor"):
            words += [f"--method.{network}.scan_layers={scan}", f"--method.{network}.remat={remat}"]
        return Bench.read("bench", [self.recipe, *words]).config()

    def measured(self, config: Any, parts: bool = False) -> dict[str, Any]:
        """Measure compilation, steps and utilization; `parts`: also seconds by part."""
        import jax

        from jepax.bench.machine import describe_machine, peak_flops
        from jepax.bench.step_bench import StepBenchmark
        from jepax.training.config import resolve_compute_dtype
        from jepax.training.setup import make_setup

        bench = StepBenchmark(make_setup(config))
        with tempfile.TemporaryDirectory() as folder:
            compiled = bench.compile(Path(folder))
        steps = bench.steps(self.rounds)
        use = bench.utilization(steps["step_s_pipelined"], peak_flops(resolve_compute_dtype(config)))
        found = {
            "batch": config.train.batch_size,
            "device": jax.devices()[0].device_kind,
            "machine": describe_machine(),
        }
        found |= {"compile": compiled, "steps": steps, "utilization": use}
        print(f"  {steps['images_per_s']:.0f} images/s, utilization {use['utilization']:.3f}", flush=True)
        return found | ({"parts": bench.parts(self.rounds)} if parts else {})

    def against(self, mode: str) -> dict[str, Any]:
        """Time our step and PyTorch's in turn."""
        from compare_torch import compare_with_torch

        found = compare_with_torch(self.config(self.batch), 2 if self.quick else 6, (mode,))
        print(f"  {found['ours_s']:.4f} s, {found['against']}", flush=True)
        return found

    def largest(self) -> dict[str, Any]:
        """Measure the largest power of two that fits, estimated from the memory of the program at 128."""
        import jax

        from jepax.bench.step_bench import StepBenchmark
        from jepax.training.setup import make_setup

        bench = StepBenchmark(make_setup(self.config(self.batch)))
        with tempfile.TemporaryDirectory() as folder:
            taken = bench.compile(Path(folder))["program_bytes"]
        state = sum(x.nbytes for x in jax.tree.leaves(bench.state) if hasattr(x, "nbytes"))
        room = MAX_FILLED * (jax.devices()[0].memory_stats() or {"bytes_limit": 2 * taken / MAX_FILLED})["bytes_limit"]
        del bench
        batch = self.batch * 2 ** int(math.log2(max((room - state) / (taken - state), 1)))
        while True:
            try:
                return self.measured(self.config(batch))
            except RuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or batch <= self.batch:
                    raise
                batch //= 2

    def attention(self) -> dict[str, Any]:
        """Time attention, forward and with its gradient, at the shapes of this recipe's networks."""
        import jax
        import jax.numpy as jnp
        import jax.random as jr
        import numpy as np

        from jepax.bench.timing import interleave
        from jepax.masking import MultiBlock
        from jepax.nn.kernels import attention, cudnn_attention

        config = self.config(self.batch).method
        encoder, predictor, context = config.encoder, config.predictor, config.masks.num_context_patches
        masks = MultiBlock(config.masks, encoder.grid(config.crop.size))
        shapes = {
            "teacher": (self.batch, math.prod(masks.grid), encoder),
            "context": (self.batch, context, encoder),
            "predictor": (self.batch * config.masks.num_targets, context + masks.largest, predictor),
        }
        on_gpu = jax.default_backend() == "gpu"
        compute = jnp.bfloat16 if on_gpu else jnp.float32
        found: dict[str, Any] = {}
        for name, (batch, tokens, network) in shapes.items():
            shape = (batch, tokens, network.heads, network.width // network.heads)
            given = tuple(jr.normal(key, shape, compute) for key in jr.split(jr.key(0), 3))
            forms: dict[str, Callable[..., jax.Array]] = {
                "ours": lambda *x: attention(*(jnp.swapaxes(each, 1, 2) for each in x)),
                "xla": lambda *x: cudnn_attention(*x, implementation="xla"),
            }
            if on_gpu:
                forms["cudnn"] = cudnn_attention
            calls: dict[str, Callable[[], object]] = {}
            for form, function in forms.items():
                both = jax.grad(lambda *x, f=function: jnp.sum(f(*x).astype(jnp.float32) ** 2), (0, 1, 2))
                for what, program in (("forward", jax.jit(function)), ("both", jax.jit(both))):
                    calls[f"{form}, {what}"] = lambda f=program, x=given: f(*x)
            found[name] = {call: float(np.median(times)) for call, times in interleave(calls, self.rounds).items()}
        return found

    def run(self, task: str) -> dict[str, Any]:
        """Run the task; return its results, or why it failed."""
        tasks: dict[str, Callable[[], dict[str, Any]]] = {
            "128": lambda: self.measured(self.config(self.batch)),
            "eager": lambda: self.against("eager"),
            "compiled": lambda: self.against("compiled"),
            "largest": self.largest,
            "parts": lambda: self.measured(self.config(self.batch), parts=True),
            "scan, dots": lambda: self.measured(self.config(self.batch, True, "dots")),
            "scan, full": lambda: self.measured(self.config(self.batch, True, "full")),
            "attention": self.attention,
        }
        try:
            return tasks[task]()
        except Exception as error:  # written to the file; the other tasks go on
            return {"failed": f"{type(error).__name__}: {str(error)[-1000:]}"}


def run_tasks(recipe: str, tasks: list[str], quick: bool, path: Path) -> None:
    """Run the tasks of a recipe, and write each one's results to the file at once."""
    case = Case(recipe, quick)
    for task in tasks:
        print(f"{recipe}, {task} ...", flush=True)
        started = time.monotonic()
        found = case.run(task) | {"took_s": round(time.monotonic() - started, 1)}
        print(f"  {found.get('failed', 'done')} in {found['took_s']} s", flush=True)
        results = json.loads(path.read_text()) if path.exists() else {}
        results.setdefault(recipe, {})[task] = found
        path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (9)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    tasks = [*TASKS[0], *TASKS[1]]
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="tiny networks: only to see that it runs, also on a CPU")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return run_tasks(args.recipes[0], args.tasks, args.quick, args.json)
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="jepax-") as folder:
        environment = {"JAX_COMPILATION_CACHE_DIR": folder} | os.environ
        environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the same under another name; one of them may be set
        for group, memory in zip(TASKS, MEMORY, strict=True):
            for recipe in args.recipes:
                if wanted := [task for task in group if task in args.tasks]:
                    run_process(recipe, wanted, args, environment | {"XLA_CLIENT_MEM_FRACTION": memory}, end)


def run_process(
    recipe: str, tasks: list[str], args: argparse.Namespace, environment: dict[str, str], end: float
) -> None:
    """Run the tasks of a recipe in a process of their own, until the time `end` at most."""
    left = end - time.monotonic()
    if left < 30:
        print(f"{recipe}: no time left for {', '.join(tasks)}", flush=True)
        return
    command = [sys.executable, __file__, "--here", "--json", str(args.json), "--recipes", recipe]
    command += [*(["--quick"] if args.quick else []), "--tasks", *tasks]
    try:
        ended = subprocess.run(command, env=environment, timeout=left)
        if ended.returncode:
            print(f"{recipe}: ended with {ended.returncode}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{recipe}: not done with all of {', '.join(tasks)}", flush=True)


if __name__ == "__main__":
    main()
