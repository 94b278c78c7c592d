"""Sharding: the batch over all devices, parameters replicated or sharded (FSDP), micro-batches within a device."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jepax.distributed import multihost
from jepax.nn.stack import BlockStack
from jepax.trees import EMA
from jepax.types import UserError

T = TypeVar("T")
MIN_SHARD_SIZE = 2**14
"""Arrays of fewer numbers, such as biases, are replicated: sharding them saves nothing and costs time."""
AUTO_FSDP_FRACTION = 0.25
"""`auto` shards a state that takes more than this fraction of a device's memory."""


@dataclass(frozen=True)
class ShardingConfig:
    """Replicated or sharded parameters; the batch is always sharded."""

    params: Literal["auto", "ddp", "fsdp"] = "auto"
    """Parameters and optimizer state: replicated on every device, or sharded over all of them (FSDP). auto: sharded if
    the state takes more than a quarter of a device's memory."""
    target_encoder: Literal["same", "ddp", "fsdp"] = "same"
    """The EMA teacher: as the parameters, or a choice of its own."""


@dataclass(frozen=True)
class ShardingPlan:
    """Places the state of a run on a mesh, and splits a step's batch into micro-batches."""

    mesh: Mesh
    shard_params: bool = False
    """Shards parameters and optimizer state over all devices (FSDP); else every device has all of them."""
    shard_teacher: bool = False
    """The same for everything beneath an `EMA`."""
    num_microbatches: int = 1
    """Micro-batches that go through the networks one after the other."""

    @property
    def is_sharded(self) -> bool:
        """True if any parameter is sharded."""
        return self.shard_params or self.shard_teacher

    def shardings(self, tree: PyTree) -> PyTree:
        """The sharding of each array of the tree (arrays may be abstract); None for other leaves."""

        def of(node: object) -> PyTree:
            split = self.shard_teacher if isinstance(node, EMA) else self.shard_params
            return jax.tree.map(lambda x: self.sharding(x.shape, split) if hasattr(x, "dtype") else None, node)

        return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, EMA))

    def sharding(self, shape: tuple[int, ...], split: bool) -> NamedSharding:
        """The sharding of one array of this shape."""
        return NamedSharding(self.mesh, self.spec(shape) if split else PartitionSpec())

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Split the larger of the last two axes that the devices divide; never the axis of stacked layers."""
        axes = [axis for axis in range(len(shape))[-2:] if shape[axis] % self.mesh.shape["data"] == 0]
        if math.prod(shape) < MIN_SHARD_SIZE or not axes:
            return PartitionSpec()
        chosen = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*[None] * chosen, "data")

    def abstract(self, tree: PyTree) -> PyTree:
        """The tree of arrays, or of abstract ones, as `ShapeDtypeStruct` with shardings."""
        shardings = self.shardings(tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def bytes(self, tree: PyTree) -> int:
        """Bytes of the tree of arrays, or of abstract ones, on one device."""
        arrays = jax.tree.leaves(self.abstract(tree))
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)

    def constrain(self, tree: T) -> T:
        """Constrain the tree's arrays to their shardings; inside `jit`."""
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.shardings(tree))

    def gather(self, tree: T) -> T:
        """FSDP's all-gather: floating-point arrays on every device for the matrix products to come.

        Their gradients go back to the shards. Without it XLA would move activations too, and several times as many
        bytes.
        """
        return jax.tree.map(lambda x: _gather(self, x) if eqx.is_inexact_array(x) else x, tree)

    def __str__(self) -> str:
        names = {True: "sharded (FSDP)", False: "replicated"}
        teacher = "" if self.shard_teacher == self.shard_params else f", teacher {names[self.shard_teacher]}"
        return f"parameters {names[self.shard_params]}{teacher}"


def gather_params(method: T, plan: ShardingPlan | None) -> T:
    """All-gather a method's parameters; those of a `BlockStack` are gathered block by block, as each one runs."""
    if plan is None or not plan.is_sharded:
        return method

    def gather(node: object) -> object:
        return replace(node, gather=plan.gather) if isinstance(node, BlockStack) else plan.gather(node)

    return jax.tree.map(gather, method, is_leaf=lambda node: isinstance(node, BlockStack))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(plan: ShardingPlan, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(plan.mesh, PartitionSpec()))


def _gather_forward(plan: ShardingPlan, x: Array) -> tuple[Array, None]:
    return _gather(plan, x), None


def _gather_backward(plan: ShardingPlan, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, plan.sharding(gradient.shape, plan.shard_params)),)


_gather.defvjp(_gather_forward, _gather_backward)


M = TypeVar("M", bound=eqx.Module)


def microbatched(forward: Callable[[M, PyTree], T], num_microbatches: int) -> Callable[[M, PyTree], T]:
    """Make `forward(module, examples)` run in micro-batches; arrays of examples and results lead with the batch axis.

    Only a micro-batch's inputs and results are stored for the backward pass, which runs it forward once more. A loss
    over the batch reads all results, so only memory and time change, also for losses with statistics of the batch.
    """
    if num_microbatches == 1:
        return forward

    def run(module: M, examples: PyTree) -> T:
        # Gradients of low-precision parameters are summed over micro-batches in float32: they pass through this copy.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, module)

        @eqx.filter_checkpoint
        def call(wide: M, microbatch: PyTree) -> T:
            narrow = jax.tree.map(lambda w, m: w.astype(m.dtype) if eqx.is_inexact_array(m) else w, wide, module)
            return forward(narrow, microbatch)

        # Example i goes to micro-batch i modulo their number, so that every device keeps its own examples.
        def divide(x: Array) -> Array:
            return jnp.swapaxes(x.reshape(len(x) // num_microbatches, num_microbatches, *x.shape[1:]), 0, 1)

        def join(x: Array) -> Array:
            return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

        microbatches = jax.tree.map(divide, examples)
        return jax.tree.map(join, jax.lax.map(lambda microbatch: call(wide, microbatch), microbatches))

    return run


def choose_plan(config: ShardingConfig, mesh: Mesh, state_bytes: int, num_microbatches: int = 1) -> ShardingPlan:
    """Choose the plan for a state of this size. With many processes, process 0 decides; all of them must call it."""
    split = config.params == "fsdp"
    if config.params == "auto":
        split = mesh.size > 1 and state_bytes > AUTO_FSDP_FRACTION * device_memory_bytes()
    split = bool(multihost.broadcast(int(split)))
    split_teacher = split if config.target_encoder == "same" else config.target_encoder == "fsdp"
    return ShardingPlan(mesh, split, split_teacher, num_microbatches)


def device_memory_bytes() -> float:
    """Memory of one device in bytes; infinite on a CPU, whose devices share it."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return float(stats["bytes_limit"]) if stats else float("inf")


def make_mesh(devices: int | None = None) -> Mesh:
    """Make a mesh of all devices of all hosts, or of the first ones, with axes `data` and `model` (of size 1).

    The axes are `Auto`: `jax.make_mesh`'s default, `Explicit`, needs shardings at every array operation.
    """
    count, chosen = devices or jax.device_count(), jax.devices()[:devices] if devices else None
    return jax.make_mesh((count, 1), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto), devices=chosen)


def check_batch(batch_size: int, num_microbatches: int = 1) -> None:
    """Raise `UserError` if the devices do not divide the batch, or a micro-batch of it."""
    unit = jax.device_count() * num_microbatches
    if batch_size % unit:
        parts = f" in train.grad_accum_steps={num_microbatches} micro-batches" if num_microbatches > 1 else ""
        raise UserError(
            f"train.batch_size={batch_size} does not divide over {jax.device_count()} devices{parts};"
            f" try {max(batch_size // unit, 1) * unit}"
        )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put every array of the tree on every device; each process must pass the same values."""
    sharding = NamedSharding(mesh, PartitionSpec())

    # Between processes nothing is sent; `device_put` would compare every value.
    def put(x: jax.Array | np.ndarray) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        parts = [jax.device_put(x, device) for device in mine]  # in the mesh's order, which keys need
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(lambda x: put(x) if isinstance(x, (jax.Array, np.ndarray)) else x, tree)


def shard_if_possible(batch: T) -> T:
    """Shard a batch over the devices of the only process if they divide it; else return it unchanged."""
    size = len(jax.tree.leaves(batch)[0])
    if jax.process_count() > 1 or jax.device_count() == 1 or size % jax.device_count():
        return batch
    return shard_batch(batch, make_mesh())


def to_host(array: jax.Array) -> np.ndarray:
    """Copy all of an array to this host. For an array that spans processes, all of them must call it."""
    return np.asarray(array if array.is_fully_addressable else process_allgather(array, tiled=True))


def to_local(tree: T) -> T:
    """Copy a tree to this process alone: every array unsharded, one copy where there are several processes.

    For sharded arrays, all processes must call it.
    """

    def copy(x: object) -> object:
        if not isinstance(x, jax.Array):
            return x
        if not x.is_fully_replicated:
            x = _gather_program(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
        return x if jax.process_count() == 1 else x.addressable_data(0)

    return jax.tree.map(copy, tree)


@lru_cache
def _gather_program(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def shard_batch(batch: T, mesh: Mesh) -> T:
    """Make this host's slice of a batch its part of global arrays, sharded over all devices on the first axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
