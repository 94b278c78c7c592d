"""Our I-JEPA training step against plain PyTorch's on this machine: same weights, views, masks and arithmetic, in turn.

    python benchmarks/step_vs_torch.py [NAME ...] [--quick] [--python PATH] [--rounds N] [--json FILE]

A NAME is one of the settings below or a recipe of I-JEPA, whose fields other flags override: --train.batch-size=64.
First all sides must agree on the losses of three steps; only then is anything timed. See README.md in this folder.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jepax.distributed.malloc import run_cpu_synchronously, trim_heap, tune_malloc

# As the command line does, before jax and torch start threads. The first serves all sides, the second only ours.
tune_malloc()
run_cpu_synchronously()

# The sides share an accelerator's memory, so none reserves it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# ruff: noqa: E402
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from compare_torch import (
    LOSS_TOLERANCE,
    MODES,
    TOTAL_STEPS,
    check_is_ijepa,
    check_losses_agree,
    check_torch,
    jax_step,
    make_batches,
    make_method,
    time_in_turn,
    torch_step,
)
from jepax.bench.machine import describe_machine, peak_memory, reset_peak_memory
from jepax.bench.timing import interleave
from jepax.commands.bench import Bench
from jepax.distributed.multihost import cores
from jepax.masking import MultiBlockConfig
from jepax.methods.base import example_keys
from jepax.methods.ijepa import IJEPAConfig
from jepax.nn import VIT_SIZES, PredictorConfig, ViTConfig
from jepax.training.config import Config, TrainConfig, resolve_compute_dtype
from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig

SIDES = ("ours", *(f"torch, {mode}" for mode in MODES))


# ---- Settings ----


def setting(encoder: ViTConfig, predictor: PredictorConfig, side: int, context: int, batch: int) -> Config:
    """A step in float32, as CPUs run it."""
    crop = CropConfig(size=(side, side), scale=(0.3, 1.0))
    method = IJEPAConfig(
        encoder=encoder, predictor=predictor, masks=MultiBlockConfig(num_context_patches=context), crop=crop
    )
    return Config(recipe="benchmark", method=method, train=TrainConfig(batch_size=batch, compute_dtype="float32"))


def at_224(size: str, width: int, batch: int) -> Config:
    """A patch of 16 at 224 px, 50 context patches, a predictor of depth 6."""
    encoder = ViTConfig(patch_size=16, **VIT_SIZES[size])
    return setting(encoder, PredictorConfig(width=width, depth=6, num_heads=encoder.num_heads), 224, 50, batch)


SETTINGS = {
    "tiny": at_224("tiny", 96, 16),
    "small": at_224("small", 192, 8),
    "base": at_224("base", 384, 4),
    "small_pictures": setting(
        ViTConfig(patch_size=4, width=192, depth=6, num_heads=3),
        PredictorConfig(width=96, depth=6, num_heads=3),
        32,
        12,
        128,
    ),
}
"""ViT-Ti/16, S/16 and B/16 at 224 px; width 192, depth 6, patch 4 at 32 px."""


def make_config(name: str, overrides: list[str], quick: bool) -> Config:
    """The setting's or the recipe's. `quick`: four images and two blocks, only to see that everything runs.

    Raises `UserError` for an unknown recipe or field, and for another method than I-JEPA.
    """
    config = SETTINGS.get(name) or Bench.read("bench", [name, *overrides]).config()
    check_is_ijepa(config)
    if not quick:
        return config
    networks = {network: replace(getattr(config.method, network), depth=2) for network in ("encoder", "predictor")}
    return replace(config, method=replace(config.method, **networks), train=replace(config.train, batch_size=4))


# ---- A side, in a process of its own ----


class Side:
    """One side's training state in a process of its own, so that neither's threads nor its memory disturb another."""

    def __init__(self, python: str, side: str, words: list[str]):
        command = [python, __file__, "--serve", side, *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.ask("about")

    def ask(self, request: str) -> Any:
        """Send one request; receive one answer."""
        print(request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(answer)

    def run(self, count: int = 1) -> float:
        """Run so many steps there; return the last one's loss."""
        return self.ask(f"step {count}")

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(side: str, config: Config) -> None:
    """Answer the requests of `Side.ask`."""
    answers, sys.stdout = sys.stdout, sys.stderr
    method, dtype = make_method(config), jnp.dtype(resolve_compute_dtype(config)).name
    batches = make_batches(method, config.train.batch_size)
    about = describe_machine(*([] if side == "ours" else ["torch"]))
    about |= {"backend": jax.default_backend(), "dtype": dtype}
    if side != "ours":
        import torch

        torch.set_num_threads(cores())
        about |= {"torch_threads": torch.get_num_threads()}

    # Memory counts from here: without the programs that made weights and inputs, which no step uses.
    jax.clear_caches()
    reset_memory()
    before = peak_memory() or 0
    if side == "ours":
        run = jax_step(method, batches, dtype, config.train.log_every_steps)
    else:
        run = torch_step(method, batches, dtype, side.removeprefix("torch, "))

    def peak() -> int | None:
        return (peak_memory() or 0) - before if jax.default_backend() == "cpu" else None

    handlers = {"about": lambda: about, "step": run, "reset": reset_memory, "peak": peak}
    handlers["draw"] = lambda: draw_seconds(config)
    for line in sys.stdin:
        name, *counts = line.split()
        print(json.dumps(handlers[name](*map(int, counts))), file=answers, flush=True)


def reset_memory() -> None:
    """Count the peak of memory from here, without what compiling needed."""
    trim_heap()
    reset_peak_memory()


def draw_seconds(config: Config) -> float:
    """Median seconds to draw a batch's views and masks at the published block sizes, from 512 px or less."""
    side, batch = min(512, 2 * config.method.crop.size[0]), config.train.batch_size
    canvas = np.random.default_rng(0).integers(0, 256, (batch, side, side, config.method.encoder.in_channels), np.uint8)
    images = ImageBatch(jnp.asarray(canvas), jnp.full((batch, 2), side, jnp.int32), jnp.arange(batch))
    method = eqx.filter_eval_shape(lambda: config.method.build(total_steps=TOTAL_STEPS, key=jr.key(0)))
    draw = jax.jit(lambda images, key: method.draw(images, example_keys(key, images.index)))
    return float(np.median(interleave({"draw": lambda: draw(images, jr.key(0))}, rounds=10)["draw"]))


# ---- The comparison ----


def compare(words: list[str], python: str, rounds: int) -> dict[str, Any]:
    """Losses, seconds of steps in turn, and each side's peak memory while it steps (CPUs only).

    Memory is counted beyond what the process used before: libraries, inputs, and the weights that all start from.
    """
    with ExitStack() as stack:
        pythons = {side: python if side == "ours" else sys.executable for side in SIDES}
        sides = {side: stack.enter_context(Side(pythons[side], side, words)) for side in SIDES}
        runs, ours = {name: side.run for name, side in sides.items()}, sides["ours"]
        losses = check_losses_agree(runs, LOSS_TOLERANCE[ours.about["dtype"]])
        for side in sides.values():
            side.ask("reset")
        found = time_in_turn(runs, rounds, pipelined=ours.about["backend"] != "cpu")
        found |= {"peak_bytes": {name: side.ask("peak") for name, side in sides.items()}, "losses": losses}
        machines = {name: side.about for name, side in sides.items()}
        return found | {"machine": machines, "views_and_masks_s": ours.ask("draw")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"a recipe of I-JEPA, or {', '.join(SETTINGS)}; these unless given"
    )
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds: only to see that it runs")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="the interpreter of our side; this one unless given"
    )
    parser.add_argument("--rounds", type=int, help="timed steps of each side (20; 3 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    names = args.names or list(SETTINGS)
    try:
        configs = {name: make_config(name, overrides, args.quick) for name in names}
        if args.serve:
            return serve(args.serve, configs[names[0]])
        check_torch()
    except UserError as error:
        raise SystemExit(str(error)) from error
    report: dict[str, Any] = {"quick": args.quick, "rounds": args.rounds or (3 if args.quick else 20), "settings": {}}
    for name, config in configs.items():
        found = compare([name, *overrides, *(["--quick"] if args.quick else [])], args.python, report["rounds"])
        show(name, found)
        report["settings"][name] = {"method": asdict(config.method), "batch": config.train.batch_size} | found
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def show(name: str, found: dict[str, Any]) -> None:
    """Print one setting's result."""
    print(f"{name}: ours {found['ours_s']:.4f} s; our views and masks {found['views_and_masks_s']:.4f} s")
    for other, against in found["against"].items():
        spread = f"quartiles of pairs {against['low']:.2f} to {against['high']:.2f}"
        print(f"  {other} {against['theirs_s']:.4f} s: ratio {against['ratio']:.2f} ({spread})")
        ours, theirs = found["peak_bytes"]["ours"], found["peak_bytes"][other]
        if ours and theirs:
            print(f"    peak memory {ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB: ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
