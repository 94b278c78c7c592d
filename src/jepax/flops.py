"""FLOPs and residual memory of a function, from its jaxpr: nothing is computed, so shapes may be of any size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree

from jepax.nn.stack import BlockStack


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of the matrix products and convolutions in `function(*arguments)`.

    A multiply and an add count as two, a scan `length` times, a `cond` as its most expensive branch, a `while` once.
    Arguments may be abstract shapes. Stacks of blocks among them are counted in plain JAX and without
    rematerialization: fused kernels are opaque to the count, and MFU counts each model FLOP once.
    """

    def plain(node: Any) -> Any:
        return replace(node, fast=False, remat="none") if isinstance(node, BlockStack) else node

    arguments = jax.tree.map(plain, arguments, is_leaf=lambda node: isinstance(node, BlockStack))
    return _count_jaxpr(eqx.filter_make_jaxpr(function)(*arguments)[0].jaxpr)


def _count_jaxpr(jaxpr: Jaxpr) -> float:
    return sum(map(_count_equation, jaxpr.eqns), start=0.0)


def _count_equation(equation: JaxprEqn) -> float:
    inner = [_count_jaxpr(jaxpr) for jaxpr in _sub_jaxprs(equation.params)]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        case "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            return 2.0 * math.prod(out) * math.prod(kernel) / outputs
        case "scan":
            return float(equation.params["length"] * sum(inner))
        case "cond":
            return max(inner)
    return sum(inner, start=0.0)


def _sub_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Every jaxpr among an equation's parameters: bodies of loops, branches, called functions."""
    for value in params.values():
        for member in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(member, (ClosedJaxpr, Jaxpr)):
                yield member.jaxpr if isinstance(member, ClosedJaxpr) else member


def residual_bytes(function: Callable[..., Any], params: PyTree, *rest: Any) -> int:
    """Bytes that the forward pass of `function(params, *rest)` saves for the gradient with respect to `params`.

    Arguments are excluded: they are in memory anyway. Rematerialization is included; the compiler's workspace and
    its savings by fusion are not.
    """

    def residuals(params: PyTree, *rest: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda p: function(p, *rest), params)[1])

    jaxpr = eqx.filter_make_jaxpr(residuals)(params, *rest)[0].jaxpr
    given = {id(variable) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    saved = {id(v): v.aval for v in jaxpr.outvars if not isinstance(v, Literal) and id(v) not in given}
    return sum(map(_array_bytes, saved.values()))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of the tree's arrays; leaves may be abstract shapes."""
    return sum(_array_bytes(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def _array_bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
