"""Where arrays lie: one mesh over all devices, the batch split over `data`, parameters on every device."""

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jepax.types import Images, UserError


def make_mesh(devices: int | None = None) -> Mesh:
    """All devices of all hosts, or the first ones, on the axis `data`; `model` has size 1 until parameters are sharded.

    The axes are `Auto`: `jax.make_mesh`'s default, `Explicit`, asks every array operation for shardings.
    """
    axes, kinds = ("data", "model"), (AxisType.Auto, AxisType.Auto)
    if devices is None:
        return jax.make_mesh((jax.device_count(), 1), axes, axis_types=kinds)
    return jax.make_mesh((devices, 1), axes, axis_types=kinds, devices=jax.devices()[:devices])


def check_batch(batch_size: int) -> None:
    """Raises `UserError` where the devices cannot share the batch equally."""
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"train.batch_size={batch_size} does not divide over {devices} devices;"
            f" try {max(batch_size // devices, 1) * devices}"
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


def local(tree: PyTree) -> PyTree:
    """The tree for this process alone, out of several: of every array, which each device holds whole, one copy."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


def shard_batch(images: Images, mesh: Mesh) -> Images:
    """This host's slice of a batch, as its part of one array over all devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), images)
