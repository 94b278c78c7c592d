"""Our I-JEPA training step against plain PyTorch's on this machine: same weights, views, masks and arithmetic, in turn.

    python benchmarks/step_vs_torch.py [--quick] [--python PATH] [--rounds N] [--json FILE] [SETTING ...]

First all sides must agree on the losses of three steps; only then is anything timed. See README.md beside this file.
"""

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jepax.distributed.malloc import run_cpu_synchronously, trim_heap, tune_malloc

tune_malloc()  # as the command line does, and before jax and torch start threads: it serves all sides
run_cpu_synchronously()  # as the command line does, too: of ours alone

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.bench import memory, timing, torch_baseline
from jepax.bench.environment import describe_machine
from jepax.distributed.multihost import cores
from jepax.masking import MultiBlockConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.nn import VIT_SIZES, PredictorConfig, ViTConfig
from jepax.training.config import Config, TrainConfig
from jepax.types import ImageBatch
from jepax.views import CropConfig


def setting(encoder: ViTConfig, predictor: PredictorConfig, side: int, context: int, batch: int) -> Config:
    """A step in float32, as CPUs take it."""
    crop = CropConfig(size=(side, side), scale=(0.3, 1.0))
    method = IJEPAConfig(encoder=encoder, predictor=predictor, masks=MultiBlockConfig(context=context), crop=crop)
    return Config(recipe="benchmark", method=method, train=TrainConfig(batch_size=batch, precision="float32"))


def at_224(size: str, width: int, batch: int) -> Config:
    """A patch of 16 at 224 px, 50 context patches, a predictor of depth 6."""
    encoder = ViTConfig(patch_size=16, **VIT_SIZES[size])
    return setting(encoder, PredictorConfig(width=width, depth=6, heads=encoder.heads), 224, 50, batch)


SETTINGS = {
    "tiny": at_224("tiny", 96, 16),
    "small": at_224("small", 192, 8),
    "base": at_224("base", 384, 4),
    "small_pictures": setting(
        ViTConfig(patch_size=4, width=192, depth=6, heads=3), PredictorConfig(width=96, depth=6, heads=3), 32, 12, 128
    ),
}
"""ViT-Ti/16, S/16 and B/16 at 224 px; width 192, depth 6, patch 4 at 32 px."""


def quick(config: Config) -> Config:
    """The same shapes with a batch of four and two blocks: to see that everything runs, not to be quoted."""
    networks = {name: replace(getattr(config.method, name), depth=2) for name in ("encoder", "predictor")}
    return replace(config, method=replace(config.method, **networks), train=replace(config.train, batch_size=4))


def views_and_masks(config: Config) -> list[float]:
    """Seconds to make one batch of our views and masks, at the published ranges of block sizes, from 512 px or less."""
    method, side, batch = config.method, min(512, 2 * config.method.crop.size[0]), config.train.batch_size
    canvas = np.random.default_rng(0).integers(0, 256, (batch, side, side, method.encoder.channels), np.uint8)
    images = ImageBatch(jnp.asarray(canvas), jnp.full((batch, 2), side, jnp.int32), jnp.arange(batch))
    sampler = method.sampler()
    make = jax.jit(lambda images, key: method.views_and_masks(images, sampler, key=key))
    return timing.interleave({"": lambda: make(images, jr.key(0))}, rounds=10)[""]


SIDES = ("ours", "torch, eager", "torch, compiled")


class Side:
    """One side's training state in a process of its own, so that neither's threads nor its memory disturb another."""

    def __init__(self, python: str, side: str, setting: str, quick: bool):
        command = [python, __file__, "--serve", side, setting, *(["--quick"] if quick else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.ask("about")

    def ask(self, what: str) -> Any:
        """One line there, one line back."""
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(answer)

    def step(self) -> float:
        """Takes a step there and returns its loss."""
        return self.ask("step")

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(side: str, config: Config) -> None:
    """Answers what `Side.ask` asks."""
    answers, sys.stdout = sys.stdout, sys.stderr
    method = torch_baseline.FixedViewIJEPA(
        torch_baseline.published_config(config.method), total_steps=torch_baseline.TOTAL_STEPS, key=jr.key(0)
    )
    inputs = torch_baseline.make_inputs(method, config.train.batch_size)
    on = describe_machine(*([] if side == "ours" else ["torch"]))
    if side != "ours":
        import torch

        torch.set_num_threads(cores())
        on |= {"torch_threads": torch.get_num_threads()}
    jax.clear_caches()  # the programs that made weights and inputs: no side steps by them
    forget()
    before = memory.peak_bytes() or 0
    if side == "ours":
        step = torch_baseline.jax_step(method, inputs, "float32", config.train.log_every)
    else:
        step = torch_baseline.torch_step(method, inputs, "float32", compiled=side == "torch, compiled")
    asked = {"about": lambda: on, "step": step, "forget": forget, "peak": lambda: (memory.peak_bytes() or 0) - before}
    for line in sys.stdin:
        print(json.dumps(asked[line.strip()]()), file=answers, flush=True)


def forget() -> None:
    """Lets the peak of memory count from here on, without what compiling took."""
    trim_heap()
    memory.reset_peak()


def compare(name: str, python: str, small: bool, rounds: int) -> dict[str, Any]:
    """Losses, seconds of steps in turn, and the most memory that each side held while it stepped, beyond what its
    process held before: libraries, inputs, and the weights that all start from."""
    with ExitStack() as stack:
        pythons = {side: python if side == "ours" else sys.executable for side in SIDES}
        sides = {side: stack.enter_context(Side(pythons[side], side, name, small)) for side in SIDES}
        losses = torch_baseline.check_losses_agree(
            {name: side.step for name, side in sides.items()}, torch_baseline.LOSS_TOLERANCE["float32"]
        )
        for side in sides.values():
            side.ask("forget")
        times = timing.interleave({name: side.step for name, side in sides.items()}, rounds)
        held = {name: side.ask("peak") for name, side in sides.items()}
        ours = times["ours"]
        against = {
            side: timing.median_ratio(ours, times[side]) | {"theirs_s": float(np.median(times[side]))}
            for side in SIDES[1:]
        }
        about = {name: side.about for name, side in sides.items()}
    found = {"ours_s": float(np.median(ours)), "against": against, "peak_bytes": held, "losses": losses}
    return found | {"machine": about, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds: only to see that it runs")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="the interpreter of our side; this one unless given"
    )
    parser.add_argument("--rounds", type=int, help="timed steps of each side per setting (20; 3 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        config = SETTINGS[args.settings[0]]
        return serve(args.serve, quick(config) if args.quick else config)
    rounds = args.rounds or (3 if args.quick else 20)
    report: dict[str, Any] = {"quick": args.quick, "rounds": rounds, "settings": {}}
    for name in args.settings or SETTINGS:
        config = quick(SETTINGS[name]) if args.quick else SETTINGS[name]
        found = compare(name, args.python, args.quick, rounds)
        found["views_and_masks_s"] = float(np.median(views_and_masks(config)))
        show(name, found)
        report["settings"][name] = {"method": asdict(config.method), "batch": config.train.batch_size} | found
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def show(name: str, found: dict[str, Any]) -> None:
    """One setting's result as it is read."""
    print(f"{name}: ours {found['ours_s']:.4f} s; our views and masks {found['views_and_masks_s']:.4f} s")
    for other, against in found["against"].items():
        spread = f"quartiles of pairs {against['low']:.2f} to {against['high']:.2f}"
        print(f"  {other} {against['theirs_s']:.4f} s: ratio {against['ratio']:.2f} ({spread})")
        ours, theirs = found["peak_bytes"]["ours"], found["peak_bytes"][other]
        if ours and theirs:
            print(f"    peak memory {ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB: ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
