"""Our I-JEPA step against the same step in plain PyTorch: same weights, views, masks and arithmetic, in turn.

Views and masks are made beforehand, every target block has the largest size, so that neither side pads, and before
anything is timed the losses of the first steps must agree.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.bench import timing
from jepax.distributed.multihost import cores
from jepax.methods import Method
from jepax.methods.ijepa import IJEPA, IJEPAConfig
from jepax.nn.pos_embed import sincos_2d
from jepax.optim import OptimConfig, Optimizer
from jepax.training.config import Config, resolve_compute_dtype
from jepax.training.step import TrainContext, init_state, run_train_step
from jepax.types import ImageBatch, UserError

TOTAL_STEPS, WARMUP_STEPS = 1000, 100
"""Steps of the run that the schedules of both sides belong to."""
CHECKED_STEPS, LOSS_TOLERANCE = 3, {"float32": 1e-5, "bfloat16": 1e-2}
"""Steps whose losses must agree, and how closely, relative, by the type of matrix products."""
NUM_BATCHES = 2
MIN_PIPELINED_S = 0.7
"""Seconds for which an accelerator takes one step after the other in each round, as in training: the host waits for the
last alone."""


RunSteps = Callable[..., float]
"""Takes so many steps, one by default, and returns the last one's loss."""


class PreparedBatch(ImageBatch):
    """A batch whose views and masks are drawn already; of its pictures nothing is left."""

    view: Any = None
    masks: Any = None


class FixedViewIJEPA(IJEPA):
    """I-JEPA whose loss takes the view and masks as they are, so that no random choice is timed."""

    def loss(self, images: PreparedBatch, *, key: Any) -> Any:
        return self.loss_of(images.view, images.masks, key=key)


def published_config(config: IJEPAConfig) -> IJEPAConfig:
    """I-JEPA as published at this config's shapes, each target block of the largest size."""
    largest = {"target_scale": config.masks.target_scale[1:] * 2, "target_aspect": config.masks.target_aspect[1:] * 2}
    kept = {name: getattr(config, name) for name in ("encoder", "predictor", "crop")}
    return IJEPAConfig(**kept, masks=replace(config.masks, **largest))


def compare_with_torch(config: Config, rounds: int, peers: tuple[str, ...] = ("eager", "compiled")) -> dict[str, Any]:
    """Times our step and the peer's, eager and compiled, or one of them.

    Raises `UserError` for methods that the peer does not know, and where torch is missing; `AssertionError` where the
    losses differ: then the times would mean nothing.
    """
    if not isinstance(config.method, IJEPAConfig):
        raise UserError(f"--baseline torch is for I-JEPA; {config.recipe} trains {config.method.name}")
    try:
        import torch
    except ImportError as error:
        raise UserError('--baseline torch needs PyTorch: pip install "jepax[bench]"') from error
    torch.set_num_threads(cores())
    method = FixedViewIJEPA(published_config(config.method), total_steps=TOTAL_STEPS, key=jr.key(0))
    compute = jnp.dtype(resolve_compute_dtype(config)).name
    inputs = make_inputs(method, config.train.batch_size)
    calls = {"ours": jax_step(method, inputs, compute, config.train.log_every)}
    calls |= {f"torch, {name}": torch_step(method, inputs, compute, compiled=name == "compiled") for name in peers}
    losses = check_losses_agree(calls, LOSS_TOLERANCE[compute])
    in_a_row = 1 if jax.default_backend() == "cpu" else math.ceil(MIN_PIPELINED_S / timing.time_call(calls["ours"]))
    several = {name: partial(call, in_a_row) for name, call in calls.items()}
    times = {name: [each / in_a_row for each in taken] for name, taken in timing.interleave(several, rounds).items()}
    against = {
        name: timing.median_ratio(times["ours"], taken) | {"theirs_s": float(np.median(taken))}
        for name, taken in times.items()
        if name != "ours"
    }
    return {"losses": losses, "ours_s": float(np.median(times["ours"])), "against": against, "seconds": times}


def make_inputs(method: IJEPA, batch: int) -> list[PreparedBatch]:
    """Batches of random views and masks, every target of full length."""
    config = method.config
    keys = jr.split(jr.key(1), (NUM_BATCHES, batch))
    shape = (NUM_BATCHES, batch, *config.crop.size, config.encoder.channels)
    views = np.random.default_rng(0).standard_normal(shape, np.float32)
    empty = (jnp.zeros((batch, 0, 0, shape[-1]), jnp.uint8), jnp.zeros((batch, 2), jnp.int32), jnp.arange(batch))
    draw = jax.jit(method.masks)
    inputs = [
        PreparedBatch(*empty, view=jnp.asarray(view), masks=draw(key)) for view, key in zip(views, keys, strict=True)
    ]
    assert all(bool(drawn.masks.target_valid.all()) for drawn in inputs)
    return inputs


def jax_step(method: Method, inputs: list[PreparedBatch], compute: str, log_every: int) -> RunSteps:
    """A function that takes our next step or steps, as `jepax train` compiles them, and returns the last loss."""
    optimizer, batches = Optimizer(OptimConfig(), TOTAL_STEPS, WARMUP_STEPS), cycle(inputs)
    fixed = TrainContext(optimizer, jr.key(0), jnp.dtype(compute), log_every=log_every)
    state = init_state(jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, method), fixed.optimizer)

    def step(count: int = 1) -> float:
        nonlocal state
        for _ in range(count):
            state, metrics = run_train_step(fixed, next(batches), state)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def torch_step(method: IJEPA, inputs: list[PreparedBatch], compute: str, *, compiled: bool) -> RunSteps:
    """A function that takes the peer's next step, from our weights, or the next ones, and returns the last loss."""
    import torch

    from jepax.bench.torch_peer import Schedules, TorchBaseline

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    encoder, predictor = torch_networks(method)
    peer = TorchBaseline(
        encoder.to(device),
        predictor.to(device),
        Schedules(TOTAL_STEPS, WARMUP_STEPS),
        method.config.encoder.patch_size,
        half=compute == "bfloat16",
        compiled=compiled,
    )

    def moved() -> Iterator[Any]:
        for drawn in inputs:
            arrays = (drawn.view, drawn.masks.context, drawn.masks.targets)
            tensors = [torch.tensor(np.asarray(array), device=device) for array in arrays]
            yield tensors[0], *(indices.long() for indices in tensors[1:])

    batches = cycle(list(moved()))
    return lambda count=1: float([peer.step(*next(batches)) for _ in range(count)][-1])


def torch_networks(method: IJEPA) -> tuple[Any, Any]:
    """The peer's encoder and predictor, with our initial parameters."""
    import torch

    from jepax.bench.torch_peer import Encoder, Predictor, copy_linear

    e, p, grid = method.config.encoder, method.config.predictor, method.masks.grid
    hidden = round(e.width * e.mlp_ratio)
    encoder = Encoder(e.patch_size**2 * e.channels, e.width, e.depth, e.heads, hidden, sincos_2d(grid, e.width))
    predictor = Predictor(p.width, p.depth, p.heads, e.width, sincos_2d(grid, p.width))
    for net, source in ((encoder, method.encoder), (predictor, method.predictor)):
        for name in ("embed", "norm"):
            copy_linear(getattr(net, name), getattr(source, name).weight, getattr(source, name).bias)
        for layer, block in enumerate(net.blocks):
            copy_block(block, jax.tree.map(lambda leaf, layer=layer: leaf[layer], source.stack.blocks))
    copy_linear(predictor.project, method.predictor.proj.weight, method.predictor.proj.bias)
    predictor.mask_token.data.copy_(torch.tensor(np.asarray(method.predictor.mask_token)))
    return encoder, predictor


def copy_block(block: Any, ours: Any) -> None:
    """Copies a block's parameters in."""
    from jepax.bench.torch_peer import copy_linear

    layers = {
        "norm1": ours.norm1,
        "qkv": ours.attention.qkv,
        "project": ours.attention.proj,
        "norm2": ours.norm2,
        "expand": ours.mlp.fc1,
        "contract": ours.mlp.fc2,
    }
    for name, layer in layers.items():
        copy_linear(getattr(block, name), layer.weight, layer.bias)


def check_losses_agree(calls: dict[str, RunSteps], tolerance: float) -> list[list[float]]:
    """The first losses of all sides, ours first. Raises `AssertionError` where they differ."""
    found = [[call() for call in calls.values()] for _ in range(CHECKED_STEPS)]
    for step, (mine, *others) in enumerate(found):
        for other in others:
            assert abs(mine - other) <= tolerance * abs(other), (
                f"losses of step {step}: ours {mine!r}, theirs {other!r}"
            )
    return found
