"""Builds a run once, for training and for every tool that looks at it: data, optimizer, sharding, keys, state."""

from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jepax.data import OnCorrupt, Source, batches, open_source
from jepax.distributed import multihost, sharding
from jepax.distributed.sharding import ShardingPlan
from jepax.flops import tree_bytes
from jepax.methods.base import Method, MethodConfig
from jepax.optim import Optimizer
from jepax.training.config import (
    Config,
    check_same_config_on_hosts,
    check_same_data_on_hosts,
    make_optimizer,
    resolve_compute_dtype,
    validate,
)
from jepax.training.step import TrainContext, TrainState, init_train_state


@dataclass(frozen=True)
class Setup:
    """A run before its first step. Nothing of it is on a device yet."""

    config: Config
    source: Source | None
    """Training examples; None for tools that bring their own batch."""
    optimizer: Optimizer
    plan: ShardingPlan

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.optimizer.total_steps

    @property
    def context(self) -> TrainContext:
        """The static arguments of the training step."""
        # Hashable, and equal for equal configs: a new value would compile the step again.
        train = self.config.train
        dtype = resolve_compute_dtype(self.config)
        return TrainContext(self.optimizer, dtype, train.grad_guard, self.plan, train.log_every_steps)

    @property
    def base_key(self) -> PRNGKeyArray:
        """The key that all randomness of the steps derives from, on every device."""
        # Not `jr.key(seed)`, which makes the initial parameters: one key is never used for two purposes.
        return sharding.replicate(jr.fold_in(jr.key(self.config.seed), 1), self.plan.mesh)

    def init_state(self) -> TrainState:
        """The state before step 0, on the devices. One program for every seed; no device exceeds its shard."""
        # If sharded, the program itself places each array, so no device has more than its part.
        key = jr.key(self.config.seed)
        if self.plan.is_sharded:
            return _init_state(self.config.method, self.optimizer, key, self.plan)
        return sharding.replicate(_init_state(self.config.method, self.optimizer, key), self.plan.mesh)

    def abstract_state(self) -> TrainState:
        """The state as abstract shapes: no memory."""
        return abstract_state(self.config.method, self.optimizer)

    def batches(
        self, start: int = 0, *, steps: int | None = None, on_corrupt: OnCorrupt | None = None
    ) -> Generator[Any, None, None]:
        """This host's slices of the batches from step `start` to the last one, or to `steps`."""
        data = self.config.data
        return batches(
            self.source,
            batch_size=self.config.train.batch_size,
            steps=self.total_steps if steps is None else steps,
            start=start,
            seed=self.config.seed,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            on_corrupt=on_corrupt,
        )

    def abstract_batch(self, batch_size: int) -> PyTree:
        """A global batch as abstract shapes, from one example of the data."""
        # Only shapes and types are used, so one example is enough, read without threads.
        (example,) = batches(self.source, batch_size=1, steps=1, seed=0, num_threads=0)
        arrays = jax.tree.map(np.asarray, example)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), arrays)


def make_setup(config: Config, source: Source | None = None) -> Setup:
    """Open the data and choose the sharding. Writes nothing, so a config that cannot be trained leaves no folder.

    `source` replaces the data that the config names. Every process of a run must call it; raises `UserError`.
    """
    # The same config on every host, valid for these devices and this data. An error of one process is raised in all.
    with multihost.collective_errors():
        check_same_config_on_hosts(config)
    with multihost.collective_errors():
        sharding.check_batch(config.train.batch_size, config.train.grad_accum_steps)
        source = open_source(config.data, "train") if source is None else source
        validate(config, source)
        optimizer = make_optimizer(config, len(source))
    with multihost.collective_errors():
        check_same_data_on_hosts(source)

    # Replicated or sharded, by the size of the state.
    return Setup(config, source, optimizer, make_plan(config, optimizer))


def make_plan(config: Config, optimizer: Optimizer, devices: int | None = None) -> ShardingPlan:
    """The sharding of the run's state over all devices, or over the first ones."""
    size = tree_bytes(abstract_state(config.method, optimizer))
    mesh = sharding.make_mesh(devices)
    return sharding.choose_plan(config.train.sharding, mesh, size, config.train.grad_accum_steps)


@lru_cache(maxsize=32)
def abstract_state(config: MethodConfig, optimizer: Optimizer) -> TrainState:
    """The state of a run as abstract shapes. Kept: tracing a method takes a second, and a run asks several times."""
    return eqx.filter_eval_shape(_init_state, config, optimizer, jr.key(0))


@eqx.filter_jit
def init_method(config: MethodConfig, total_steps: int, key: PRNGKeyArray) -> Method:
    """The method before step 0, as one program: one operation at a time takes ten times longer."""
    return config.build(total_steps=total_steps, key=key)


@eqx.filter_jit
def _init_state(
    config: MethodConfig, optimizer: Optimizer, key: PRNGKeyArray, plan: ShardingPlan | None = None
) -> TrainState:
    state = init_train_state(init_method(config, optimizer.total_steps, key), optimizer)
    return plan.constrain(state) if plan else state
