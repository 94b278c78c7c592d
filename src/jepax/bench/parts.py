"""Where a step's time goes. Each part is a program of its own, so what XLA fuses across them is not seen.

Forward parts are timed by themselves; what they leave of the loss is `objective`, what the loss leaves of its gradients
`backward`, and what those leave of the step `optimiser and teacher` (and guard and norms). So the parts add up.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from jepax.bench.clock import in_turn
from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.methods import Method
from jepax.methods.ijepa import IJEPA
from jepax.methods.multiview import MultiView, embed
from jepax.sharding import gather_params
from jepax.step import loss_and_gradients
from jepax.trees import cast
from jepax.types import Images

if TYPE_CHECKING:
    from jepax.bench.subject import Subject

Forward = tuple[Callable[[Method, Any], Any], Any]
"""A function of the method and what it is given."""


def parts_of(subject: "Subject", rounds: int) -> dict[str, float]:
    """Median seconds by part, in the order in which they come; below 0 where the clock is too coarse for one."""
    compute, layout = subject.fixed.compute, subject.fixed.layout
    key = jr.fold_in(subject.fixed.root, 0)
    method = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, subject.state.method)  # steps take theirs
    images = subject.images

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        @eqx.filter_jit(compiler_options=COMPILER_OPTIONS)
        def run(*arguments: Any) -> Any:
            with layout.applied():
                return function(*arguments)

        return run

    def forward(function: Callable[[Method, Any], Any]) -> Callable[..., Any]:
        return program(lambda method, given: function(gather_params(cast(method, compute), layout), given))

    draw = program(lambda images, key: views_of(method, images, key))
    views = draw(images, key)
    calls = {"views and masks": (draw, images, key)}
    calls |= {
        name: (forward(function), method, given) for name, (function, given) in forwards(method, views, compute).items()
    }
    alone = list(calls)
    loss = program(lambda m, i, k: gather_params(cast(m, compute), layout).loss(i, key=k))
    calls["loss"] = (loss, method, images, key)
    calls["gradients"] = (program(lambda m, i, k: loss_and_gradients(m, i, k, compute)), method, images, key)
    timed = {name: (lambda call=call: call[0](*call[1:])) for name, call in calls.items()}
    timed["step"] = subject.step
    medians = {name: float(np.median(times)) for name, times in in_turn(timed, rounds).items()}
    parts = {name: medians[name] for name in alone}
    parts["objective"] = medians["loss"] - sum(parts.values())
    parts["backward"] = medians["gradients"] - medians["loss"]
    return parts | {"optimiser and teacher's move": medians["step"] - medians["gradients"]}


def views_of(method: Method, images: Images, key: PRNGKeyArray) -> Any:
    """What the method draws of a batch."""
    if isinstance(method, IJEPA):
        return method.config.views_and_masks(images, method.masks, key=key)
    return method.config.draw_views(images, key=key) if isinstance(method, MultiView) else ()


def forwards(method: Method, views: Any, compute: DTypeLike) -> dict[str, Forward]:
    """The forward passes of the networks, by what they are called; none of a method that is not known here."""
    if isinstance(method, IJEPA):
        seen = jax.eval_shape(lambda m, v: m.encoder(v[0], v[1].context), method, views)
        context = jr.normal(jr.key(0), seen.shape, compute)
        return {
            "teacher, forward": (lambda m, v: m.targets(v[0]), views),
            "context encoder, forward": (lambda m, v: m.encoder(v[0], v[1].context), views),
            "predictor, forward": (lambda m, given: m.predictions(*given), (context, views[1])),
        }
    if isinstance(method, MultiView):
        found: dict[str, Forward] = {"encoder, forward": (lambda m, v: [embed(m.encoder, group) for group in v], views)}
        if hasattr(method, "target"):
            found["teacher, forward"] = (lambda m, v: embed(m.target.average[0], v[0]), views)
        return found
    return {}
