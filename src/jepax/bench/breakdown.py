"""Times the verbs of a step. Each part is a separate program, so XLA's fusion across parts is not measured.

`draw`, `forward` and `objective` are timed separately; `backward` is the gradient's time minus theirs, and `optimizer
and teacher` (with the guard and the norms) the step's time minus the gradient's. So the parts add up to the step.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.bench.timing import interleave
from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.distributed.sharding import gather_params
from jepax.methods.base import example_keys, objective_key
from jepax.training.step import loss_and_grads
from jepax.trees import cast

if TYPE_CHECKING:
    from jepax.bench.step_bench import StepBenchmark


def time_by_verb(bench: "StepBenchmark", repeats: int) -> dict[str, float]:
    """Median seconds by part, in the order of the step; below 0 if the clock is too coarse for one."""
    setup, batch = bench.setup, bench.batch
    context, key = setup.context, jr.fold_in(setup.base_key, 0)
    method = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, bench.state.method)  # steps donate theirs

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        return eqx.filter_jit(compiler_options=COMPILER_OPTIONS)(function)

    def computed(method: Any) -> Any:
        return gather_params(cast(method, context.compute_dtype), context.plan)

    draw = program(lambda m, b, k: m.draw(b, example_keys(k, b.index)))
    forward = program(lambda m, v: computed(m).forward(v))
    objective = program(lambda m, o, k: computed(m).objective(o, key=objective_key(k))[0])
    gradient = program(lambda m, b, k: loss_and_grads(m, b, k, context))
    views = draw(method, batch, key)
    outputs = forward(method, views)
    calls = {
        "draw": lambda: draw(method, batch, key),
        "forward": lambda: forward(method, views),
        "objective": lambda: objective(method, outputs, key),
        "gradient": lambda: gradient(method, batch, key),
        "step": bench.step,
    }
    times = {name: float(np.median(values)) for name, values in interleave(calls, repeats).items()}
    parts = {name: times[name] for name in ("draw", "forward", "objective")}
    return parts | {
        "backward": times["gradient"] - sum(parts.values()),
        "optimizer and teacher": times["step"] - times["gradient"],
    }
