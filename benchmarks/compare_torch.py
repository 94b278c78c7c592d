"""Our I-JEPA step against the same step in plain PyTorch: same weights, views, masks and arithmetic, in turn.

Views and masks are made beforehand, and every target block has the largest size, so that neither side pads. Before
anything is timed, the losses of the first steps must agree. `step_vs_torch.py` and `gpu.py` call this file.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, Key

from jepax.bench.timing import interleave, time_call
from jepax.distributed.multihost import cores
from jepax.methods.ijepa import IJEPA, IJEPAConfig
from jepax.nn.pos_embed import sincos_2d
from jepax.optim import OptimConfig, Optimizer
from jepax.training.config import Config, resolve_compute_dtype
from jepax.training.step import TrainContext, init_train_state, run_train_step
from jepax.types import UserError
from jepax.views import MaskedViews

TOTAL_STEPS, WARMUP_STEPS = 1000, 100
"""Steps of the run that the schedules of both sides belong to."""
CHECKED_STEPS, LOSS_TOLERANCE = 3, {"float32": 1e-5, "bfloat16": 1e-2}
"""Steps whose losses must agree, and how closely, relative, by the type of matrix products."""
NUM_BATCHES = 2
MIN_PIPELINED_S = 0.7
"""Seconds for which an accelerator runs one step after the other in each round, as in training: the host waits for the
last one only."""
MODES = ("eager", "compiled")
"""Of PyTorch."""

RunSteps = Callable[..., float]
"""Runs so many steps, one by default, and returns the last one's loss."""


# ---- What is compared ----


class GivenBatch(eqx.Module):
    """A batch whose views and masks are already drawn."""

    index: Int[Array, "batch"]
    views: MaskedViews


class GivenViewsIJEPA(IJEPA):
    """I-JEPA that takes the batch's own views and masks, so that no random choice is timed."""

    def draw(self, batch: GivenBatch, keys: Key[Array, "batch"]) -> MaskedViews:
        return batch.views


def check_is_ijepa(config: Config) -> None:
    """Raise `UserError` for any other method."""
    if not isinstance(config.method, IJEPAConfig):
        raise UserError(f"PyTorch's step is I-JEPA's; {config.recipe} trains {config.method.name}")


def check_torch() -> None:
    """Raise `UserError` without PyTorch."""
    if find_spec("torch") is None:
        raise UserError('the comparison needs PyTorch: pip install "jepax[bench]"')


def make_method(config: Config) -> IJEPA:
    """I-JEPA as published at this config's shapes, each target block of the largest size."""
    method, masks = config.method, config.method.masks
    largest = {"target_scale": masks.target_scale[1:] * 2, "target_aspect_ratio": masks.target_aspect_ratio[1:] * 2}
    kept = {name: getattr(method, name) for name in ("encoder", "predictor", "crop")}
    published = IJEPAConfig(**kept, masks=replace(masks, **largest))
    return GivenViewsIJEPA(published, total_steps=TOTAL_STEPS, key=jr.key(0))


def make_batches(method: IJEPA, size: int) -> list[GivenBatch]:
    """Batches of random views and masks, every target of full length."""
    config = method.config
    keys = jr.split(jr.key(1), (NUM_BATCHES, size))
    shape = (NUM_BATCHES, size, *config.crop.size, config.encoder.in_channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    draw, index = jax.jit(method.masks), jnp.arange(size)
    views = [MaskedViews(jnp.asarray(image), draw(key)) for image, key in zip(images, keys, strict=True)]
    assert all(bool(each.masks.target_valid.all()) for each in views)
    return [GivenBatch(index, each) for each in views]


# ---- Our step, and PyTorch's from our weights ----


def jax_step(method: IJEPA, batches: list[GivenBatch], dtype: str, log_every_steps: int) -> RunSteps:
    """Our training step, as `jepax train` compiles it."""
    optimizer, endless = Optimizer(OptimConfig(), TOTAL_STEPS, WARMUP_STEPS), cycle(batches)
    context = TrainContext(optimizer, jnp.dtype(dtype), log_every_steps=log_every_steps)
    base_key = jr.key(0)
    state = init_train_state(jax.tree.map(jnp.copy, method), optimizer)  # a copy: the step donates its state

    def run(count: int = 1) -> float:
        nonlocal state
        for _ in range(count):
            state, metrics = run_train_step(state, next(endless), base_key, context)
        jax.block_until_ready(state)
        return float(metrics["train/loss"])

    return run


def torch_step(method: IJEPA, batches: list[GivenBatch], dtype: str, mode: str) -> RunSteps:
    """PyTorch's training step, eager or compiled, on the kind of device that we use."""
    import torch

    from torch_ijepa import Schedules, TorchIJEPA

    torch.set_num_threads(cores())
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    encoder, predictor = (net.to(device) for net in torch_networks(method))
    schedules, patch = Schedules(TOTAL_STEPS, WARMUP_STEPS), method.config.encoder.patch_size
    trainer = TorchIJEPA(encoder, predictor, schedules, patch, half=dtype == "bfloat16", compiled=mode == "compiled")

    def tensors(batch: GivenBatch) -> tuple[Any, Any, Any]:
        masks = batch.views.masks
        arrays = (batch.views.image, masks.context, masks.targets)
        view, context, targets = (torch.tensor(np.asarray(array), device=device) for array in arrays)
        return view, context.long(), targets.long()

    endless = cycle([tensors(batch) for batch in batches])
    return lambda count=1: float([trainer.step(*next(endless)) for _ in range(count)][-1])


def torch_networks(method: IJEPA) -> tuple[Any, Any]:
    """PyTorch's encoder and predictor, with our initial parameters."""
    import torch

    from torch_ijepa import Encoder, Predictor

    e, p, grid = method.config.encoder, method.config.predictor, method.masks.grid
    hidden, pixels = round(e.width * e.mlp_ratio), e.patch_size**2 * e.in_channels
    encoder = Encoder(pixels, e.width, e.depth, e.num_heads, hidden, sincos_2d(grid, e.width))
    hidden = round(p.width * p.mlp_ratio)
    predictor = Predictor(p.width, p.depth, p.num_heads, hidden, e.width, sincos_2d(grid, p.width))
    for net, source in ((encoder, method.encoder), (predictor, method.predictor)):
        copy_layer(net.embed, source.embed)
        copy_layer(net.norm, source.norm)
        for number, block in enumerate(net.blocks):
            copy_block(block, jax.tree.map(lambda leaf, number=number: leaf[number], source.stack.blocks))
    copy_layer(predictor.proj, method.predictor.proj)
    predictor.mask_token.data.copy_(torch.tensor(np.asarray(method.predictor.mask_token)))
    return encoder, predictor


def copy_block(block: Any, source: Any) -> None:
    """Copy the parameters of one of our blocks into PyTorch's."""
    layers = {"norm1": source.norm1, "qkv": source.attention.qkv, "proj": source.attention.proj}
    layers |= {"norm2": source.norm2, "fc1": source.mlp.fc1, "fc2": source.mlp.fc2}
    for name, layer in layers.items():
        copy_layer(getattr(block, name), layer)


def copy_layer(layer: Any, source: Any) -> None:
    """Copy a linear layer's or a norm's parameters; our matrices are (inputs, outputs)."""
    import torch

    layer.weight.data.copy_(torch.tensor(np.asarray(source.weight).T))
    layer.bias.data.copy_(torch.tensor(np.asarray(source.bias)))


# ---- The comparison ----


def compare_with_torch(config: Config, rounds: int, modes: tuple[str, ...] = MODES) -> dict[str, Any]:
    """Time our step and PyTorch's in this process. Raises `UserError` without PyTorch, or for other methods."""
    check_is_ijepa(config)
    check_torch()
    method, dtype = make_method(config), jnp.dtype(resolve_compute_dtype(config)).name
    batches = make_batches(method, config.train.batch_size)
    sides = {"ours": jax_step(method, batches, dtype, config.train.log_every_steps)}
    sides |= {f"torch, {mode}": torch_step(method, batches, dtype, mode) for mode in modes}
    losses = check_losses_agree(sides, LOSS_TOLERANCE[dtype])
    return {"losses": losses} | time_in_turn(sides, rounds, pipelined=jax.default_backend() != "cpu")


def check_losses_agree(sides: dict[str, RunSteps], tolerance: float) -> list[list[float]]:
    """Run the first steps of all sides and return their losses, ours first.

    Raises `AssertionError` if they differ: then the times would mean nothing.
    """
    found = [[run() for run in sides.values()] for _ in range(CHECKED_STEPS)]
    for step, (ours, *others) in enumerate(found):
        for theirs in others:
            close = abs(ours - theirs) <= tolerance * abs(theirs)
            assert close, f"losses of step {step}: ours {ours!r}, theirs {theirs!r}"
    return found


def time_in_turn(sides: dict[str, RunSteps], rounds: int, *, pipelined: bool) -> dict[str, Any]:
    """Seconds per step of each side, and the ratios of ours to the others'.

    `pipelined`: each round runs several steps, and the host waits for the last one only.
    """
    count = math.ceil(MIN_PIPELINED_S / time_call(sides["ours"])) if pipelined else 1
    taken = interleave({name: partial(run, count) for name, run in sides.items()}, rounds)
    times = {name: [seconds / count for seconds in each] for name, each in taken.items()}
    against = {
        name: median_ratio(times["ours"], each) | {"theirs_s": float(np.median(each))}
        for name, each in times.items()
        if name != "ours"
    }
    return {"ours_s": float(np.median(times["ours"])), "against": against, "seconds": times}


def median_ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratio of the medians, and the quartiles of the ratios of neighboring calls."""
    pairs = np.array(ours) / np.array(theirs)
    low, high = np.percentile(pairs, (25, 75))
    return {"ratio": float(np.median(ours) / np.median(theirs)), "low": float(low), "high": float(high)}
