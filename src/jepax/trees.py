"""Operations on trees of parameters: trainable mask, EMA, precision, norms."""

from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

T = TypeVar("T")


class EMA(eqx.Module, Generic[T]):
    """Moving average of another module. Nothing beneath this node is optimized: the type is the rule."""

    average: T

    def update(self, online: T, momentum: Float[Array, ""] | float) -> "EMA[T]":
        """average <- momentum * average + (1 - momentum) * online, in the average's precision.

        In bfloat16 it stalls, since 1 - 0.996 is about that type's epsilon.
        """

        def move(average: object, new: object) -> object:
            if not eqx.is_inexact_array(average):
                return average
            return round_to_dtype(momentum * average + (1.0 - momentum) * jax.lax.stop_gradient(new), average.dtype)

        return EMA(jax.tree.map(move, self.average, online))


def round_to_dtype(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Round x to `dtype`. A cast alone is not enough: XLA may use the unrounded value within the same program."""
    info = jnp.finfo(dtype)
    if info.bits < jnp.finfo(x.dtype).bits:
        x = jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return x.astype(dtype)


def _is_ema(node: object) -> bool:
    return isinstance(node, EMA)


def trainable(tree: PyTree) -> PyTree:
    """Boolean tree for `eqx.partition`: true for floating-point arrays that are not beneath an `EMA`."""

    def mark(node: object) -> object:
        if _is_ema(node):
            return jax.tree.map(lambda _: False, node)
        return eqx.is_inexact_array(node)

    return jax.tree.map(mark, tree, is_leaf=_is_ema)


def cast(tree: T, dtype: DTypeLike) -> T:
    """Cast every floating-point array to `dtype`: the only place where compute precision is chosen."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def count_parameters(tree: PyTree) -> int:
    """Number of floating-point parameters; leaves may be abstract shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size for leaf in leaves if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact))


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm over all floating-point arrays, accumulated in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in _float_arrays(tree)))


@eqx.filter_jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """True if every floating-point leaf is finite."""
    sums = [jnp.sum(jnp.abs(x), dtype=jnp.float32) for x in _float_arrays(tree)]
    return jnp.all(jnp.isfinite(jnp.stack(sums)))


def per_layer_norms(stacked: PyTree) -> Float[Array, "layers"]:
    """Euclidean norm of each layer of a stack whose arrays all have a leading `layers` axis."""
    arrays = _float_arrays(stacked)
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))) for x in arrays))


def _float_arrays(tree: PyTree) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
