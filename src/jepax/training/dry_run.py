"""`--dry-run`: parameters, FLOPs and memory of a run from abstract shapes, and one real step. Writes nothing.

Everything is measured through the verbs of a method, so a new method needs no code here.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jepax.data import Source
from jepax.distributed import sharding
from jepax.distributed.sharding import ShardingPlan
from jepax.flops import count_flops, residual_bytes, tree_bytes
from jepax.io import config_yaml
from jepax.methods.base import Method, example_keys, objective_key
from jepax.nn.stack import BlockStack
from jepax.training.config import Config
from jepax.training.setup import Setup, make_setup
from jepax.training.step import run_train_step
from jepax.trees import EMA, cast, count_parameters, trainable
from jepax.types import UserError

LogFn = Callable[[str], None]
LARGE_MODEL_PARAMS, LARGE_MODEL_MAX_BATCH = 50_000_000, 8
"""On a CPU, the step of a model with more trained parameters than this runs on at most this many examples."""
FAKE_IMAGENET_SIZE = 1_281_167
"""Generated images in place of an image folder that is not given: ImageNet-1k's number, for its number of steps."""


def dry_run(config: Config, print: LogFn = print, *, source: Source | None = None) -> None:
    """Print the resolved config, parameters, FLOPs and memory, and run one step if it fits.

    `source` replaces the training data that the config names. Raises `UserError` for whatever `train` would refuse,
    except for a missing `data.root` of an image folder.
    """
    setup = make_dry_setup(config, print, source)
    print(config_yaml.to_yaml(config))
    print_parameters(setup, print)
    print_flops(setup, print)
    print_memory(setup, print)
    run_one_step(setup, print)


def make_dry_setup(config: Config, print: LogFn, source: Source | None = None) -> Setup:
    """The run's setup, on generated images if the folder of images is not given."""
    if source is None and config.data.dataset == "image_folder" and config.data.root is None:
        print(f"data.root is not given: generated images replace it, {FAKE_IMAGENET_SIZE:,} as in ImageNet-1k\n")
        data = dataclasses.replace(config.data, dataset="synthetic", synthetic_size=FAKE_IMAGENET_SIZE)
        config = dataclasses.replace(config, data=data)
    setup = make_setup(config, source)
    print(f"{len(setup.source):,} training examples, {setup.total_steps:,} steps of {config.train.batch_size}")
    return setup


def print_parameters(setup: Setup, print: LogFn) -> None:
    """Print the number of parameters by module."""
    method = setup.abstract_state().method
    print("\nparameters")
    for field in dataclasses.fields(method):
        module = getattr(method, field.name)
        if count := count_parameters(module):
            print(f"  {field.name:<16}{count:>15,}{'  (not trained)' if isinstance(module, EMA) else ''}")
    print(f"  {'trained in total':<16}{count_parameters(partition_trainable(method)[0]):>15,}")


def partition_trainable(method: Method) -> tuple[Method, Method]:
    """Trained parameters, and the rest, of an abstract method."""
    return eqx.filter_eval_shape(lambda m: eqx.partition(m, trainable(m)), method)


def print_flops(setup: Setup, print: LogFn) -> None:
    """Print GFLOP per example by verb."""
    print("\nGFLOP per example (matrix products)")
    for name, count in flops_by_verb(setup).items():
        print(f"  {name:<40}{count / 1e9:>10.3f}")


def flops_by_verb(setup: Setup) -> dict[str, float]:
    """FLOPs per example of each part of a step, and their sum under "step"."""
    size, state = setup.config.train.batch_size, setup.abstract_state()
    method, batch = state.method, setup.abstract_batch(size)
    params, frozen = partition_trainable(method)

    # Abstract results of each verb feed the next one.
    def draw(method: Method, batch: Any) -> PyTree:
        return method.draw(batch, example_keys(jr.key(0), batch.index))

    def objective(method: Method, outputs: PyTree) -> jax.Array:
        return method.objective(outputs, key=objective_key(jr.key(0)))[0]

    def gradient(params: Method, frozen: Method, batch: Any) -> Method:
        return jax.grad(lambda p: eqx.combine(p, frozen).loss(batch, key=jr.key(0))[0])(params)

    views = eqx.filter_eval_shape(draw, method, batch)
    outputs = eqx.filter_eval_shape(lambda m, v: m.forward(v), method, views)
    counts = {
        "draw: views and masks": count_flops(draw, method, batch),
        "forward: networks": count_flops(lambda m, v: m.forward(v), method, views),
        "objective: loss over the batch": count_flops(objective, method, outputs),
    }

    # The backward pass is what the gradient needs beyond them. AdamW has no matrix products; Muon has.
    counts["backward"] = count_flops(gradient, params, frozen, batch) - sum(counts.values())
    counts["optimizer"] = count_flops(setup.optimizer.update, params, state.opt_state, params, state.step)
    counts["step"] = sum(counts.values())
    return {name: count / size for name, count in counts.items()}


def print_memory(setup: Setup, print: LogFn) -> None:
    """Print estimated bytes per device: what the batch size does not change, and what it does."""
    plan, devices, batch_size = setup.plan, jax.device_count(), setup.config.train.batch_size
    fixed, batch = fixed_bytes(setup, plan), bytes_per_example(setup) * (batch_size // devices)
    rows = fixed | {"batch and activations": batch, "total": sum(fixed.values()) + batch}
    placed = ""
    if devices > 1:  # the other choice of sharding, too
        other = dataclasses.replace(plan, shard_params=not plan.shard_params, shard_teacher=not plan.shard_params)
        name = f"total with train.sharding.params={'fsdp' if other.shard_params else 'ddp'}"
        rows[name], placed = sum(fixed_bytes(setup, other).values()) + batch, f"{plan}; "
    print(
        f"\nmemory per device, GB (estimated; {placed}{jnp.dtype(setup.context.compute_dtype).name},"
        f" {batch_size // devices} of {batch_size} examples; the compiler's working space is not included)"
    )
    for name, count in rows.items():
        print(f"  {name:<50}{count / 1e9:>8.3f}")
    ahead = (setup.config.data.num_threads + 1) * max(setup.config.data.num_workers, 1)
    on_host = ahead * tree_bytes(setup.abstract_batch(batch_size)) / 1e9
    print(f"batches read ahead: up to {ahead}, {on_host:.3f} GB on the host")


def fixed_bytes(setup: Setup, plan: ShardingPlan) -> dict[str, int]:
    """Bytes on a device that do not depend on the batch size."""
    state = setup.abstract_state()
    trained = plan.bytes(partition_trainable(state.method)[0])
    fixed = {
        "trained parameters": trained,
        "teacher and other": plan.bytes(state.method) - trained,
        "gradients": trained,
        "optimizer state": plan.bytes(state.opt_state),
        "copy of the method at a logged step": plan.bytes(state.method),
    }
    if plan.is_sharded:
        dtype = setup.context.compute_dtype
        fixed["gathered for the matrix products"] = gathered_param_bytes(state.method, plan, dtype)
    return fixed


def gathered_param_bytes(method: Method, plan: ShardingPlan, dtype: DTypeLike) -> int:
    """Bytes of sharded parameters that are gathered at a time: of scanned and rematerialized blocks, one block."""

    def count(tree: PyTree, is_sharded: bool) -> int:
        total = 0
        for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, (EMA, BlockStack))):
            if isinstance(node, EMA):
                total += count(node.average, plan.shard_teacher)
            elif is_sharded:
                one = isinstance(node, BlockStack) and node.scan_layers and node.remat != "none"
                total += count_parameters(node) // (node.depth if one else 1)
        return total

    return count(method, plan.shard_params) * jnp.dtype(dtype).itemsize


def bytes_per_example(setup: Setup) -> int:
    """Bytes on a device that each example adds: its arrays, and what the forward pass stores for the backward pass."""
    params, frozen = partition_trainable(setup.abstract_state().method)
    dtype = setup.context.compute_dtype

    def loss_of(params: Method, frozen: Method, batch: Any) -> jax.Array:
        return cast(eqx.combine(params, frozen), dtype).loss(batch, key=jr.key(0))[0]

    one, two = (residual_bytes(loss_of, params, frozen, setup.abstract_batch(size)) for size in (1, 2))
    return two - one + tree_bytes(setup.abstract_batch(1))


def run_one_step(setup: Setup, print: LogFn) -> None:
    """Run one step on the config's batch, or on the largest power of two that half of the free memory fits."""
    fixed, per_example = sum(fixed_bytes(setup, setup.plan).values()), bytes_per_example(setup)
    free, least = free_memory_bytes(), fixed + per_example
    if free / 2 < least:
        print(f"\none step: not run: one example needs {least / 1e9:.1f} GB; half of {free / 1e9:.1f} GB may be used")
        return

    # The batch: of the config, or smaller if memory or a CPU's patience is short.
    devices, batch_size = jax.device_count(), setup.config.train.batch_size
    size, why = 2 ** (int((free / 2 - fixed) // per_example).bit_length() - 1), "half of the free memory fits no more"
    trained = count_parameters(partition_trainable(setup.abstract_state().method)[0])
    if jax.default_backend() == "cpu" and trained > LARGE_MODEL_PARAMS and size * devices > LARGE_MODEL_MAX_BATCH:
        size, why = max(LARGE_MODEL_MAX_BATCH // devices, 1), "a CPU is slow on this model"
    unit = devices * setup.plan.num_microbatches
    size = max(min(size * devices, batch_size) // unit, 1) * unit
    print(f"\none step of {size} examples{'' if size == batch_size else f', not {batch_size}: {why}'} ...")

    # The first step of the run, as `train` runs it.
    start = time.perf_counter()
    train = dataclasses.replace(setup.config.train, batch_size=size)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, train=train))
    batch = sharding.shard_batch(next(setup.batches(steps=1)), setup.plan.mesh)
    _, metrics = run_train_step(setup.init_state(), batch, setup.base_key, setup.context)
    loss, norm = float(metrics["train/loss"]), float(metrics["optim/grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"the first step's loss is {loss} and its gradient norm {norm}; check optim and method")
    print(f"loss {loss:.4f}, gradient norm {norm:.4f}, {time.perf_counter() - start:.0f} s with compilation")


def free_memory_bytes() -> float:
    """Free memory of one device in bytes; on a CPU the host's, or its cgroup's, divided by the devices."""
    device = jax.local_devices()[0]
    if device.platform != "cpu" and (stats := device.memory_stats()):
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable: *(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
    ):
        found = re.search(pattern, Path(path).read_text()) if Path(path).exists() else None
        limits += [unit * int(found[1])] if found else []
    return min(limits) / jax.local_device_count()
