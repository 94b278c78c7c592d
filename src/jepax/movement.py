"""How far a step moved parameters and teacher: measured only at steps that get a line, by a program of its own.

Each of these norms reads as much as the whole update does: within the step they took a tenth of it (ViT-B/16, four
images, two CPU cores). At a step that gets a line the method before it is kept, for that step alone.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jepax.guard import kept
from jepax.methods import Method
from jepax.trees import norm, trainable
from jepax.types import Metrics

Measure = Callable[[Method, Int[Array, ""]], Metrics]


def since(method: Method, step: int) -> Measure:
    """Call it before `step` is taken; what it returns is called with the method after it and the guard's verdict.

    - update_norm: |parameters now - parameters before|, over all that are trained;
    - what `after_update` tells of the teacher's move.

    No number each where the guard let the step change nothing.
    """
    before = _copied(method)
    return lambda after, verdict: _measured(before, after, jnp.int32(step), verdict)


@eqx.filter_jit
def _copied(method: Method) -> Method:
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, method)


@eqx.filter_jit
def _measured(before: Method, after: Method, step: Int[Array, ""], verdict: Int[Array, ""]) -> Metrics:
    old, rest = eqx.partition(before, trainable(before))
    new = eqx.filter(after, trainable(after))
    _, moved = eqx.combine(new, rest).after_update(step)  # the move from where the teacher stood, once more
    moved |= {"update_norm": norm(jax.tree.map(jnp.subtract, new, old))}
    return {name: jnp.where(kept(verdict), value, jnp.nan) for name, value in moved.items()}
