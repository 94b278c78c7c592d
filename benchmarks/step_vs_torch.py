"""Our I-JEPA training step against a plain PyTorch one: same weights, views, masks and arithmetic, in turn.

    python benchmarks/step_vs_torch.py [--quick] [--memory] [--json FILE]

First both sides must agree on the losses of three steps; only then is anything timed. See README.md beside this file.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jepax.allocator import keep_freed_memory

keep_freed_memory()  # as the command line does, and before jax and torch start threads: it serves both sides

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import torch

from jepax.masking import MultiBlock, MultiBlockConfig
from jepax.methods.ijepa import IJEPA, IJEPAConfig
from jepax.nn import SIZES, PredictorConfig, ViTConfig
from jepax.nn.position import sincos_2d
from jepax.optim import OptimConfig, Optimizer
from jepax.step import Fixed, compiled_step, init_state
from jepax.types import Images
from jepax.views import CropConfig, random_resized_crop
from machine import cores, machine
from torch_peer import Encoder, Peer, Predictor, Schedules, put

TOTAL, WARMUP = 1000, 100  # steps of the run that the schedules belong to
CHECKED, TOLERANCE = 3, 1e-5
WARM = 3


@dataclass(frozen=True)
class Setting:
    """One pair of steps to compare."""

    size: int
    """Side of the view, in pixels."""
    canvas: int
    """Side of the stored picture, which only the time of views and masks depends on."""
    batch: int
    """Images per step."""
    encoder: ViTConfig
    predictor: PredictorConfig
    context: int
    """Context patches per image."""


SETTINGS = {
    "vit-tiny/16, 224 px": Setting(
        224, 512, 16, ViTConfig(patch_size=16, **SIZES["tiny"]), PredictorConfig(width=96, depth=6, heads=3), 50
    ),
    "width 192, depth 6, patch 4, 32 px": Setting(
        32,
        32,
        128,
        ViTConfig(patch_size=4, width=192, depth=6, heads=3),
        PredictorConfig(width=96, depth=6, heads=3),
        12,
    ),
}


class Given(IJEPA):
    """I-JEPA whose loss takes the view and masks as they are, so that no random choice is timed."""

    def loss(self, images: Any, *, key: Any) -> Any:
        return self.loss_of(*images, key=key)


def quick(setting: Setting) -> Setting:
    """The same shapes with a batch of four and two blocks: to see that everything runs, not to be quoted."""
    return replace(
        setting, batch=4, encoder=replace(setting.encoder, depth=2), predictor=replace(setting.predictor, depth=2)
    )


def ijepa_config(setting: Setting, *, full_blocks: bool) -> IJEPAConfig:
    """The method; `full_blocks` narrows the published ranges to the one size that no target needs padding for."""
    ranges = {"target_scale": (0.2, 0.2), "target_aspect": (1.5, 1.5)} if full_blocks else {}
    return IJEPAConfig(
        encoder=setting.encoder,
        predictor=setting.predictor,
        masks=MultiBlockConfig(context=setting.context, **ranges),
        crop=CropConfig(size=(setting.size, setting.size), scale=(0.3, 1.0)),
    )


def make_inputs(method: IJEPA, setting: Setting, count: int) -> list[tuple[jax.Array, Any]]:
    """`count` batches of random views and masks, every target of full length."""
    grid = (setting.batch, setting.size, setting.size, setting.encoder.channels)
    views = np.random.default_rng(0).standard_normal((count, *grid), np.float32)
    keys = jr.split(jr.key(1), (count, setting.batch))
    inputs = [(jnp.asarray(view), jax.jit(method.masks)(key)) for view, key in zip(views, keys, strict=True)]
    assert all(bool(masks.target_valid.all()) for _, masks in inputs)
    return inputs


def repeated(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def ours(method: IJEPA, inputs: list[Any]) -> Callable[[], float]:
    """A function that runs our next step, as `jepax train` compiles it, and returns its loss."""
    optimizer, root, batches = Optimizer(OptimConfig(), TOTAL, WARMUP), jr.key(0), repeated(inputs)
    state = init_state(jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, method), optimizer)

    def step() -> float:
        nonlocal state
        state, metrics = compiled_step(Fixed(optimizer, root), next(batches), state)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def theirs(method: IJEPA, inputs: list[Any]) -> Callable[[], float]:
    """A function that runs the peer's next step, from our weights, and returns its loss."""
    peer = make_peer(method)
    batches = repeated(
        [
            (
                torch.tensor(np.asarray(view)),
                torch.tensor(np.asarray(masks.context)).long(),
                torch.tensor(np.asarray(masks.targets)).long(),
            )
            for view, masks in inputs
        ]
    )
    return lambda: float(peer.step(*next(batches)))


def make_peer(method: IJEPA) -> Peer:
    """The PyTorch step with our initial parameters."""
    e, p, grid = method.config.encoder, method.config.predictor, method.masks.grid
    encoder = Encoder(e.patch_size**2 * e.channels, e.width, e.depth, e.heads, sincos_2d(grid, e.width))
    predictor = Predictor(p.width, p.depth, p.heads, e.width, sincos_2d(grid, p.width))
    for net, source in ((encoder, method.encoder), (predictor, method.predictor)):
        for name in ("embed", "norm"):
            put(getattr(net, name), getattr(source, name).weight, getattr(source, name).bias)
        for layer, block in enumerate(net.blocks):
            put_block(block, jax.tree.map(lambda leaf, layer=layer: leaf[layer], source.stack.blocks))
    put(predictor.project, method.predictor.project.weight, method.predictor.project.bias)
    predictor.mask_token.data.copy_(torch.tensor(np.asarray(method.predictor.mask_token)))
    return Peer(encoder, predictor, Schedules(TOTAL, WARMUP), e.patch_size)


def put_block(block: torch.nn.Module, ours: Any) -> None:
    layers = {
        "norm1": ours.norm1,
        "qkv": ours.attention.qkv,
        "project": ours.attention.project,
        "norm2": ours.norm2,
        "expand": ours.mlp.expand,
        "contract": ours.mlp.contract,
    }
    for name, layer in layers.items():
        put(getattr(block, name), layer.weight, layer.bias)


def check_losses(step_ours: Callable[[], float], step_theirs: Callable[[], float]) -> list[list[float]]:
    """The first losses of both sides. Raises `AssertionError` where they differ: then the times would mean nothing."""
    pairs = [[step_ours(), step_theirs()] for _ in range(CHECKED)]
    for step, (a, b) in enumerate(pairs):
        assert abs(a - b) <= TOLERANCE * abs(b), f"losses of step {step} differ: ours {a!r}, theirs {b!r}"
    return pairs


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def views_and_masks(setting: Setting) -> Callable[[], Any]:
    """A function that makes one batch of our views and masks, at the published ranges of block sizes."""
    config = ijepa_config(setting, full_blocks=False)
    masks, n, side = MultiBlock(config.masks, config.encoder.grid(config.crop.size)), setting.batch, setting.canvas
    canvas = np.random.default_rng(0).integers(0, 256, (n, side, side, setting.encoder.channels), np.uint8)
    images = Images(jnp.asarray(canvas), jnp.full((n, 2), side, jnp.int32), jnp.arange(n))
    make = jax.jit(lambda images, keys: (random_resized_crop(images, keys, config.crop), masks(keys)))
    return lambda: jax.block_until_ready(make(images, jr.split(jr.key(0), n)))


def compare(setting: Setting, rounds: int) -> dict[str, Any]:
    """Checks, warms up and times one setting: ours, theirs, ours, theirs, ..."""
    method = Given(ijepa_config(setting, full_blocks=True), total_steps=TOTAL, key=jr.key(0))
    inputs = make_inputs(method, setting, count=4)
    step_ours, step_theirs = ours(method, inputs), theirs(method, inputs)
    losses = check_losses(step_ours, step_theirs)
    pairs = [(seconds(step_ours), seconds(step_theirs)) for _ in range(WARM + rounds)][WARM:]
    make = views_and_masks(setting)
    making = [seconds(make) for _ in range(WARM + rounds)][WARM:]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [x / y for x, y in pairs]
    return {
        "losses": losses,
        "ours_s": a,
        "theirs_s": b,
        "ratio": a / b,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "views_and_masks_s": statistics.median(making),
        "seconds": pairs,
    }


def peak_memory(setting: Setting, side: str) -> int:
    """Largest resident memory in bytes while one side steps, after its warm-up; Linux only.

    Runs in a process of its own, which holds both libraries, the inputs and the side's training state.
    """
    torch.set_num_threads(cores())
    method = Given(ijepa_config(setting, full_blocks=True), total_steps=TOTAL, key=jr.key(0))
    step = {"ours": ours, "theirs": theirs}[side](method, make_inputs(method, setting, count=1))
    for _ in range(WARM):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of compiling
    for _ in range(WARM):
        step()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def memory(setting: Setting) -> dict[str, int]:
    """Peak memory of each side, one fresh process at a time."""
    peaks = {}
    for side in ("ours", "theirs"):
        with get_context("spawn").Pool(1) as pool:
            peaks[f"{side}_peak_bytes"] = pool.apply(peak_memory, (setting, side))
    return peaks


def show(name: str, result: dict[str, Any]) -> None:
    """One setting's result as it is read."""
    print(
        f"{name}\n  ours {result['ours_s']:.4f} s   theirs {result['theirs_s']:.4f} s"
        f"   ratio {result['ratio']:.2f} (min {result['ratio_min']:.2f}, max {result['ratio_max']:.2f})"
        f"   our views and masks {result['views_and_masks_s']:.4f} s"
    )
    if "ours_peak_bytes" in result:
        print(
            f"  peak memory: ours {result['ours_peak_bytes'] / 2**20:.0f} MiB,"
            f" theirs {result['theirs_peak_bytes'] / 2**20:.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny batches, few rounds: only to see that it runs")
    parser.add_argument("--memory", action="store_true", help="also each side's peak memory, in a process of its own")
    parser.add_argument("--rounds", type=int, help="timed pairs of steps per setting (20; 3 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    args = parser.parse_args()
    torch.set_num_threads(cores())
    rounds = args.rounds or (3 if args.quick else 20)
    on = machine("torch") | {"torch_threads": torch.get_num_threads()}
    report = {"quick": args.quick, "rounds": rounds, "machine": on, "settings": {}}
    for name, setting in SETTINGS.items():
        setting = quick(setting) if args.quick else setting
        result = compare(setting, rounds) | (memory(setting) if args.memory else {})
        show(name, result)
        report["settings"][name] = {"setting": asdict(setting)} | result
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
