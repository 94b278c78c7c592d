"""Rules over whole trees of parameters: which are trained, how a teacher moves, in which precision they compute."""

from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

T = TypeVar("T")


class EMA(eqx.Module, Generic[T]):
    """A moving average of another module. Nothing beneath this node is optimized: the type is the rule."""

    average: T

    def towards(self, online: T, momentum: Float[Array, ""] | float) -> "EMA[T]":
        """average <- momentum * average + (1 - momentum) * online, kept in the average's own precision (float32).

        Differs from the reference: none. In bfloat16 it stalls, since 1 - 0.996 is about its epsilon.
        """

        def move(average: object, new: object) -> object:
            if not eqx.is_inexact_array(average):
                return average
            return round_to_dtype(momentum * average + (1.0 - momentum) * jax.lax.stop_gradient(new), average.dtype)

        return EMA(jax.tree.map(move, self.average, online))


def round_to_dtype(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """x rounded to `dtype`. A cast alone does not bind: XLA may go on with the unrounded value in the same program."""
    kept = jnp.finfo(dtype)
    if kept.bits < jnp.finfo(x.dtype).bits:
        x = jax.lax.reduce_precision(x, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)
    return x.astype(dtype)


def _is_ema(node: object) -> bool:
    return isinstance(node, EMA)


def trainable(tree: PyTree) -> PyTree:
    """A tree of booleans for `eqx.partition`: true at floating-point arrays that are not beneath an `EMA`."""

    def mark(node: object) -> object:
        if _is_ema(node):
            return jax.tree.map(lambda _: False, node)
        return eqx.is_inexact_array(node)

    return jax.tree.map(mark, tree, is_leaf=_is_ema)


def cast(tree: T, dtype: DTypeLike) -> T:
    """The tree with every floating-point array in `dtype`: the one place where compute precision is chosen."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def count_parameters(tree: PyTree) -> int:
    """Number of floating-point parameters, also of a tree of abstract shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size for leaf in leaves if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact))


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm over every array of the tree, accumulated in float32."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


@eqx.filter_jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of the tree is one."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.all(jnp.stack([jnp.isfinite(jnp.sum(jnp.abs(leaf), dtype=jnp.float32)) for leaf in arrays]))


def per_layer_norms(stacked: PyTree) -> Float[Array, "layers"]:
    """Euclidean norm of each layer of a stack whose arrays all carry a leading `layers` axis."""
    leaves = [leaf for leaf in jax.tree.leaves(stacked) if eqx.is_inexact_array(leaf)]
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    return jnp.sqrt(sum(squares))
