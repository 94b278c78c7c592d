"""`jit` for the programs of an evaluation, each of which runs for seconds."""

from functools import partial

import jax

from jepax.distributed.compile_cache import QUICK_COMPILE_OPTIONS

eval_jit = partial(jax.jit, compiler_options=QUICK_COMPILE_OPTIONS)
"""`jax.jit` that compiles quickly. Such a function cannot be called inside another `jit`."""
