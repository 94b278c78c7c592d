"""AdamW, or Muon for the blocks' matrices, with warm-up, scheduled weight decay and optional gradient clipping."""

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jepax import schedules
from jepax.errors import check_fields

MUON_UPDATE_RMS = 0.2
"""RMS of a Muon update before the learning rate: about AdamW's (Liu et al. 2025, arXiv:2502.16982)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for matrices; the defaults are I-JEPA's."""

    name: Literal["adamw", "muon"] = "adamw"
    """Rule for the blocks' weight matrices: AdamW as published, or Muon at AdamW's rates; AdamW updates the rest."""
    peak_lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    start_lr: float = 2e-4
    """Learning rate at the start of the warm-up."""
    final_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 40.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.04
    """Weight decay at the first step, times the learning rate; only for tensors of two or more dimensions."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step."""
    weight_decay_schedule: schedules.ScheduleShape = "cosine"
    """Schedule from `weight_decay` to `final_weight_decay`; constant stays at `weight_decay`."""
    beta1: float = 0.9
    """Decay of the running mean of gradients (Muon: 0.95)."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the square root of the running mean of squared gradients."""
    grad_clip_norm: float | None = None
    """Largest global gradient norm; None (as published) does not clip."""
    schedule_stretch: float = 1.0
    """Length of the schedules over the length of the run (the public code's ipe_scale)."""

    def __post_init__(self) -> None:
        check_fields("optim", self, "above 0", "peak_lr", "eps", "schedule_stretch", "grad_clip_norm")
        check_fields("optim", self, "at least 0", "start_lr", "final_lr", "warmup_epochs")
        check_fields("optim", self, "at least 0", "weight_decay", "final_weight_decay")
        check_fields("optim", self, "in [0, 1)", "beta1", "beta2")


class Optimizer(eqx.Module):
    """Update rule and schedules of one run. All arithmetic is in float32.

    Schedules are read at step + 1, as published; steps are counted from 0. To change one, edit `learning_rate` or
    `weight_decay`; the curves are in `schedules.py`.
    """

    config: OptimConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)
    warmup_steps: int = eqx.field(static=True)

    @property
    def _schedule_steps(self) -> int:
        return max(round(self.config.schedule_stretch * self.total_steps), 1)

    def learning_rate(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        c, steps = self.config, {"warmup": self.warmup_steps, "total": self._schedule_steps}
        return schedules.warmup_cosine(step + 1, start=c.start_lr, peak=c.peak_lr, final=c.final_lr, **steps)

    def weight_decay(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        c, total = self.config, self._schedule_steps
        ends = {"start": c.weight_decay, "final": c.final_weight_decay}
        return schedules.ramp(c.weight_decay_schedule, step + 1, **ends, total=total)

    @property
    def _rule(self) -> optax.GradientTransformation:
        c = self.config
        # The gradient is clipped first, over all parameters; weight decay and learning rate are applied in `update`.
        clip = optax.identity() if c.grad_clip_norm is None else optax.clip_by_global_norm(c.grad_clip_norm)
        adam = optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.eps)
        if c.name == "adamw":
            return optax.chain(clip, adam)
        # Muon needs matrices: each rule is masked to its parameters and passes the others through.
        return optax.chain(clip, optax.masked(adam, _rest_mask), optax.masked(_scale_by_muon(), matrix_mask))

    def init(self, params: PyTree) -> optax.OptState:
        return self._rule.init(params)

    def update(
        self, grads: PyTree, opt_state: optax.OptState, params: PyTree, step: Int[Array, ""]
    ) -> tuple[PyTree, optax.OptState]:
        """Additive change of the parameters: -lr * (rule(grads) + decay * params), decay by `weight_decay_mask`."""
        directions, opt_state = self._rule.update(grads, opt_state, params)
        lr, decay = self.learning_rate(step), self.weight_decay(step)

        # Decoupled weight decay: it is not part of the gradient's running means.
        def change(direction: Array, param: Array, decayed: bool) -> Array:
            return -lr * (direction + decay * param if decayed else direction)

        return jax.tree.map(change, directions, params, weight_decay_mask(params)), opt_state


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for weight matrices and the mask token; false for biases, norms and other one-dimensional tensors.

    By name, because the arrays of stacked layers have one dimension more than those of one layer.
    """

    def is_decayed(path: tuple, _: Array) -> bool:
        *owners, name = _names(path)
        return name == "mask_token" or (name == "weight" and not any("norm" in owner for owner in owners))

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def matrix_mask(params: PyTree) -> PyTree:
    """True for the blocks' weight matrices, stacked as (layers, in, out)."""

    def is_matrix(path: tuple, array: Array) -> bool:
        return "blocks" in _names(path) and _names(path)[-1] == "weight" and array.ndim == 3

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _rest_mask(params: PyTree) -> PyTree:
    return jax.tree.map(lambda is_matrix: not is_matrix, matrix_mask(params))


def _names(path: tuple) -> list[str]:
    """Names of the attributes on the way to a leaf."""
    return [getattr(entry, "name", "") for entry in path]


def _scale_by_muon() -> optax.GradientTransformation:
    """Orthogonalize the momentum of each layer's matrix, then scale it to an RMS of `MUON_UPDATE_RMS`.

    Source: Jordan et al. 2024 (Muon); the scale sqrt(max(in, out)) is Liu et al. 2025's.
    """

    # An orthogonal (in, out) matrix has RMS 1 / sqrt(max(in, out)).
    def scale(update: Array) -> Array:
        return MUON_UPDATE_RMS * jnp.sqrt(max(update.shape[1:])) * update

    # Axis 0 is the layer: every layer's matrix is orthogonalized separately.
    def layers(params: PyTree) -> PyTree:
        return jax.tree.map(lambda _: MuonDimensionNumbers(reduction_axis=1, output_axis=2), params)

    return optax.chain(
        scale_by_muon(weight_dimension_numbers=layers),
        optax.stateless(lambda updates, _: jax.tree.map(scale, updates)),
    )
