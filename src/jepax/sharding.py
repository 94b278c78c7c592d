"""How a step is laid out: arrays over the devices of a mesh, parameters whole or split (FSDP), the batch in pieces."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
from jepax.trees import EMA
from jepax.types import Images, UserError

T = TypeVar("T")
SMALL = 2**14
"""Arrays of fewer numbers, such as biases, are whole on every device: to split them saves nothing and costs time."""
ROOM = 0.25
"""Share of a device's memory that the whole state may take before `auto` splits it."""


@dataclass(frozen=True)
class ShardingConfig:
    """What lies whole on every device, and what is split over all of them; the batch always is."""

    parameters: Literal["auto", "replicated", "sharded"] = "auto"
    """Parameters and optimiser state: whole on every device, or each split over all devices (FSDP). auto: split where
    the run's state would take more than a quarter of a device's memory."""
    teacher: Literal["same", "replicated", "sharded"] = "same"
    """The teacher: as the parameters, or on its own."""


@dataclass(frozen=True)
class Layout:
    """How the state of a run lies on a mesh."""

    mesh: Mesh
    parameters: bool = False
    """Whether parameters and optimiser state are split."""
    teacher: bool = False
    """Whether what lies beneath an `EMA` is."""
    pieces: int = 1
    """Parts of the batch that go through the networks one after the other."""

    def shardings(self, tree: PyTree) -> PyTree:
        """For each array of the tree, also of an abstract one, where it lies; None for what is no array."""

        def of(node: object) -> PyTree:
            split = self.teacher if isinstance(node, EMA) else self.parameters
            return jax.tree.map(lambda x: self.sharding(x.shape, split) if hasattr(x, "dtype") else None, node)

        return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, EMA))

    def abstract(self, tree: PyTree) -> PyTree:
        """The tree, whose leaves are all arrays or abstract ones, with shapes, types and places alone."""
        places = self.shardings(tree)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places)

    def sharding(self, shape: tuple[int, ...], split: bool) -> NamedSharding:
        """Where an array of this shape lies."""
        return NamedSharding(self.mesh, self.spec(shape) if split else PartitionSpec())

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Splits the larger of the last two axes that the devices can share: of stacked matrices never the axis of
        layers."""
        devices = self.mesh.shape["data"]
        axes = [axis for axis in range(len(shape))[-2:] if shape[axis] % devices == 0]
        if math.prod(shape) < SMALL or not axes:
            return PartitionSpec()
        chosen = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*[None] * chosen, "data")

    def bytes(self, tree: PyTree) -> int:
        """What one device holds of the tree's arrays, which may be abstract."""
        arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
        pairs = zip(arrays, jax.tree.leaves(self.shardings(tree)), strict=True)
        return sum(math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize for x, at in pairs)

    def pinned(self, tree: T) -> T:
        """The tree with its arrays held to where they lie; within `jit`."""
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.shardings(tree))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, what is traced is laid out so: `gathered` gathers, and `in_pieces` divides."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def __str__(self) -> str:
        names = {True: "split over them", False: "whole on each"}
        teacher = "" if self.teacher == self.parameters else f", the teacher {names[self.teacher]}"
        return f"parameters {names[self.parameters]}{teacher}"


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


def gathered(tree: T, *, but: type | tuple[type, ...] = ()) -> T:
    """The parameters of the tree whole on every device, for the matrix products to come; a gradient goes back to where
    the parameter lies. Nodes of the types `but` are left as they are: they gather their own, layer by layer.

    Without this XLA would move activations, too, and several times as many bytes. Outside `Layout.applied`: the tree.
    """
    layout = _current.get()
    if layout is None or not (layout.parameters or layout.teacher):
        return tree
    return jax.tree.map(
        lambda node: node if isinstance(node, but) else _gather_array(layout, node),
        tree,
        is_leaf=lambda node: isinstance(node, but),
    )


def _gather_array(layout: Layout, x: object) -> object:
    return _gather(layout, x) if eqx.is_inexact_array(x) else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(layout: Layout, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, PartitionSpec()))


def _gather_forward(layout: Layout, x: Array) -> tuple[Array, None]:
    return _gather(layout, x), None


def _gather_backward(layout: Layout, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, layout.sharding(gradient.shape, layout.parameters)),)


_gather.defvjp(_gather_forward, _gather_backward)


M = TypeVar("M", bound=eqx.Module)


def in_pieces(function: Callable[..., T], module: M, *batch: PyTree) -> T:
    """function(module, *batch), the arrays of `batch` and of the result leading with the batch: in the layout's pieces.

    Only inputs and results of a piece are kept for the backward pass, which goes forward once more; gradients by the
    module are summed in float32. What comes of all images, such as a loss over the batch, is computed from the whole
    result, so nothing changes but memory and time: also for losses that read statistics of the batch.
    """
    layout = _current.get()
    if layout is None or layout.pieces == 1:
        return function(module, *batch)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, module)

    def one(piece: PyTree) -> T:
        def call(wide: M, piece: PyTree) -> T:
            narrow = jax.tree.map(lambda w, m: w.astype(m.dtype) if eqx.is_inexact_array(m) else w, wide, module)
            return function(narrow, *piece)

        return eqx.filter_checkpoint(call)(wide, piece)

    def apart(x: Array) -> Array:  # image i goes to piece i modulo pieces: each takes its images from every device
        return jnp.swapaxes(x.reshape(len(x) // layout.pieces, layout.pieces, *x.shape[1:]), 0, 1)

    def joined(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(joined, jax.lax.map(one, jax.tree.map(apart, batch)))


def layout_of(config: ShardingConfig, mesh: Mesh, state_bytes: int, pieces: int = 1) -> Layout:
    """The layout that the config names, or that a state of so many bytes wants on these devices."""
    split = config.parameters == "sharded"
    if config.parameters == "auto":
        split = mesh.size > 1 and state_bytes > ROOM * device_bytes()
    return Layout(mesh, split, split if config.teacher == "same" else config.teacher == "sharded", pieces)


def agreed(layout: Layout) -> Layout:
    """The layout of process 0, whose device may be larger or smaller than others'. All have to call it."""
    parameters, teacher = (bool(multihost.broadcast(int(split))) for split in (layout.parameters, layout.teacher))
    return replace(layout, parameters=parameters, teacher=teacher)


def device_bytes() -> float:
    """Memory of one device; endless on a CPU, whose devices share it."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return float(stats["bytes_limit"]) if stats else float("inf")


def make_mesh(devices: int | None = None) -> Mesh:
    """All devices of all hosts, or the first ones, on the axis `data`; `model` has size 1.

    The axes are `Auto`: `jax.make_mesh`'s default, `Explicit`, asks every array operation for shardings.
    """
    axes, kinds = ("data", "model"), (AxisType.Auto, AxisType.Auto)
    if devices is None:
        return jax.make_mesh((jax.device_count(), 1), axes, axis_types=kinds)
    return jax.make_mesh((devices, 1), axes, axis_types=kinds, devices=jax.devices()[:devices])


def check_batch(batch_size: int, pieces: int = 1) -> None:
    """Raises `UserError` where the devices cannot share the batch, or each of its pieces, equally."""
    devices = jax.device_count()
    if batch_size % (devices * pieces):
        parts = f" in train.accumulate={pieces} pieces" if pieces > 1 else ""
        raise UserError(
            f"train.batch_size={batch_size} does not divide over {devices} devices{parts};"
            f" try {max(batch_size // (devices * pieces), 1) * devices * pieces}"
        )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every array of the tree, whole on every device; each process has to hand over the same values."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: _put(x, sharding) if isinstance(x, (jax.Array, np.ndarray)) else x, tree)


def _put(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """One array on every device. Between processes nothing is sent, where `device_put` would compare every value."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    mine = [device for device in sharding.mesh.devices.flat if device.process_index == jax.process_index()]
    parts = [jax.device_put(x, device) for device in mine]  # in the mesh's order, which keys need
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


def spread(images: Images) -> Images:
    """A batch over the devices of the only process, where they can share it equally; else as it is."""
    if jax.process_count() > 1 or jax.device_count() == 1 or len(images.index) % jax.device_count():
        return images
    return shard_batch(images, make_mesh())


def whole(array: jax.Array) -> np.ndarray:
    """All of an array on this host, also of one that spans processes: then all of them have to call it."""
    return np.asarray(array if array.is_fully_addressable else process_allgather(array, tiled=True))


def local(tree: T) -> T:
    """The tree for this process alone, its arrays whole: one copy of each where there are several processes.

    Where arrays lie split, all processes have to call it.
    """

    def of(x: object) -> object:
        if not isinstance(x, jax.Array):
            return x
        if not x.is_fully_replicated:
            x = _everywhere(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
        return x if jax.process_count() == 1 else x.addressable_data(0)

    return jax.tree.map(of, tree)


@lru_cache
def _everywhere(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def shard_batch(images: Images, mesh: Mesh) -> Images:
    """This host's slice of a batch, as its part of one array over all devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), images)
