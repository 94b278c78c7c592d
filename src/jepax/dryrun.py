"""`--dry-run`: what a run would take, told from abstract shapes, and one real step of it. Writes nothing."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jepax import config as configs
from jepax import costs, sharding
from jepax.data import Source
from jepax.masking import block_sizes
from jepax.methods import Method
from jepax.methods.ijepa import IJEPA
from jepax.methods.multiview import MultiView, embed
from jepax.nn.transformer import BlockStack
from jepax.optim import Optimizer
from jepax.settings import Config, compute_dtype, prepare
from jepax.sharding import Layout
from jepax.step import Fixed, TrainState, compiled_step, first_state, placed_state, train_step
from jepax.train import read
from jepax.trees import EMA, cast, count_parameters, trainable
from jepax.types import Images, Masks, UserError
from jepax.views import CropConfig

Say = Callable[[str], None]
LARGE, LARGE_BATCH = 50_000_000, 8
"""On a CPU, the one step of a model that trains more than LARGE parameters takes at most LARGE_BATCH images."""
STAND_IN = 1_281_167
"""Generated pictures where an image folder is not given: as many as ImageNet-1k has, so that step counts are its."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before it is one: the settings, the data, and the state as abstract shapes."""

    config: Config
    source: Source
    optimizer: Optimizer
    state: TrainState
    layout: Layout

    def images(self, batch: int) -> Images:
        """A batch as abstract shapes."""

        def build() -> Images:
            return Images(
                canvas=jnp.zeros((batch, *self.source.canvas_shape), jnp.uint8),
                size=jnp.zeros((batch, 2), jnp.int32),
                index=jnp.zeros(batch, jnp.int32),
            )

        return jax.eval_shape(build)


def dry_run(config: Config, say: Say = print) -> None:
    """Prints the resolved config, parameters, tokens, arithmetic and memory, and takes one step if it fits.

    Raises `UserError` for whatever `train` would refuse, but for a missing `data.root` of an image folder.
    """
    say(configs.text(config))
    plan = make_plan(config, say)
    say_parameters(plan, say)
    say_arithmetic(plan, say)
    take_step(plan, *say_memory(plan, say), say)


def make_plan(config: Config, say: Say) -> Plan:
    """Opens the data, or generated pictures in place of a folder that is not given, and shapes the state."""
    if config.data.source == "image_folder" and config.data.root is None:
        say(
            f"data.root is not given: generated pictures stand in, on the same canvas and as many as ImageNet-1k has"
            f" ({STAND_IN:,}); counts of steps are for that many\n"
        )
        generated = dataclasses.replace(config.data, source="synthetic", synthetic_images=STAND_IN)
        config = dataclasses.replace(config, data=generated)
    source, optimizer = prepare(config)
    say(f"{len(source):,} training pictures, {optimizer.total_steps:,} steps of {config.train.batch_size}")
    state = eqx.filter_eval_shape(first_state, config.method, optimizer, jr.key(config.seed))
    layout = sharding.layout_of(
        config.train.sharding, sharding.make_mesh(), costs.tree_bytes(state), config.train.accumulate
    )
    return Plan(config, source, optimizer, state, layout)


def say_parameters(plan: Plan, say: Say) -> None:
    """Counts by module; a teacher is not trained."""
    method = plan.state.method
    say("\nparameters")
    for field in dataclasses.fields(method):
        module = getattr(method, field.name)
        if count := count_parameters(module):
            say(f"  {field.name:<16}{count:>15,}{'  (not trained)' if isinstance(module, EMA) else ''}")
    say(f"  {'trained in all':<16}{count_parameters(split(method)[0]):>15,}")


def split(method: Method) -> tuple[Method, Method]:
    """Trained parameters, and the rest, of an abstract method."""
    return eqx.filter_eval_shape(lambda m: eqx.partition(m, trainable(m)), method)


def say_arithmetic(plan: Plan, say: Say) -> None:
    """Tokens and FLOPs per image, by part where the method's parts are known, and of the whole step."""
    step = step_flops(plan)
    method = plan.state.method
    if isinstance(method, IJEPA):
        masks, target, patches = method.config.masks, method.masks.largest, method.masks.grid[0] * method.masks.grid[1]
        say(
            f"\ntokens per image: teacher {patches}, context encoder {masks.context}, predictor {masks.blocks} blocks"
            f" of {masks.context} + {target} = {masks.blocks * (masks.context + target)}"
        )
    if isinstance(method, MultiView):
        say(f"\ntokens per image: {viewed_tokens(method)}")
    say("\narithmetic per image, GFLOP (matrix products)")
    for name, count in part_flops(plan, step).items():
        say(f"  {name:<40}{count / 1e9:>10.3f}")
    say(f"  {'the whole step':<40}{step / 1e9:>10.3f}")
    if isinstance(method, IJEPA):
        over = 100 * (step / unpadded_flops(plan, step) - 1)
        say(
            f"arithmetic: {step / 1e9:.4g} GFLOP per image, {over:+.1f}% over the unpadded step"
            " (mean over the sizes that target blocks take)"
        )


def viewed_tokens(method: MultiView) -> str:
    """Views and patches of each group, in words."""
    views, grid = method.config.views, method.config.encoder.grid
    groups = (("global", views.globals, views.global_crop), ("local", views.locals, views.local_crop))
    return ", ".join(f"{count} {name} views of {math.prod(grid(crop.size))}" for name, count, crop in groups if count)


def step_flops(plan: Plan) -> float:
    """FLOPs per image of one training step: those of the batch, over its images."""
    batch = plan.config.train.batch_size
    return costs.flops(train_step, plan.optimizer, plan.state, plan.images(batch), jr.key(0)) / batch


def update_flops(plan: Plan) -> float:
    """FLOPs of the optimiser per image, its update being one for the batch. AdamW has no matrix products."""
    params, _ = split(plan.state.method)
    count = costs.flops(plan.optimizer.update, params, plan.state.opt_state, params, plan.state.step)
    return count / plan.config.train.batch_size


def part_flops(plan: Plan, step: float) -> dict[str, float]:
    """FLOPs per image of the parts of a method, of `step` in all; nothing for methods not known here."""
    method = plan.state.method
    if isinstance(method, MultiView):
        return {name: count for name, count in multiview_flops(plan, step).items() if count}
    if not isinstance(method, IJEPA):
        return {}
    view, masks = shaped(method, method.masks.largest)
    context = jax.ShapeDtypeStruct((1, masks.context.shape[1], method.config.encoder.width), jnp.float32)

    def encode(encoder: PyTree, view: PyTree, masks: Masks) -> jax.Array:
        return jnp.sum(encoder(view, masks.context))

    def predict(predictor_context: PyTree, masks: Masks) -> jax.Array:
        predictor, context = predictor_context
        return jnp.sum(predictor(context, masks, method.masks.grid, also_context=bool(method.config.context_weight)))

    def target(method: IJEPA, view: PyTree) -> jax.Array:
        return jnp.sum(method.targets(view))

    shared = method.config.teacher == "shared"
    parts = {
        f"target encoder, forward{' and backward' if shared else ''}": costs.flops(
            eqx.filter_grad(target) if shared else target, method, view
        ),
        "context encoder, forward and backward": costs.flops(eqx.filter_grad(encode), method.encoder, view, masks),
        "predictor, forward and backward": costs.flops(eqx.filter_grad(predict), (method.predictor, context), masks),
        "optimiser, shared by the batch": update_flops(plan),
    }
    return {"views and regularisers": step - sum(parts.values())} | parts


def multiview_flops(plan: Plan, step: float) -> dict[str, float]:
    """FLOPs per image of the parts of a method that compares views; what is not the encoder's comes together."""
    encoder, views = plan.state.method.encoder, plan.state.method.config.views

    def encode(encoder: PyTree, group: PyTree) -> jax.Array:
        return jnp.sum(embed(encoder, group))

    def of(count: int, crop: CropConfig) -> float:
        group = jax.ShapeDtypeStruct((count, 1, *crop.size, encoder.config.channels), jnp.float32)
        return costs.flops(eqx.filter_grad(encode), encoder, group) if count else 0.0

    parts = {
        "encoder, global views, both passes": of(views.globals, views.global_crop),
        "encoder, local views, both passes": of(views.locals, views.local_crop),
        "optimiser, shared by the batch": update_flops(plan),
    }
    return {"views, heads, teacher and objective": step - sum(parts.values())} | parts


def unpadded_flops(plan: Plan, step: float) -> float:
    """FLOPs per image, of `step` padded, if each target block had just the size drawn: the mean over that draw."""
    method, masks = plan.state.method, plan.state.method.config.masks
    sizes, chances = block_sizes(method.masks.grid, masks.target_scale, masks.target_aspect, masks.margin)
    counts: dict[int, float] = {}
    for size, chance in zip(sizes.prod(axis=1).tolist(), chances.tolist(), strict=True):
        counts[size] = counts.get(size, 0.0) + chance
    mean = sum(chance * loss_flops(method, size) for size, chance in counts.items())
    return step - loss_flops(method, method.masks.largest) + mean


def loss_flops(method: IJEPA, target: int) -> float:
    """FLOPs per image of loss and gradient with target blocks of `target` patches each."""
    params, rest = split(method)

    def loss_of(params: IJEPA, rest: IJEPA, view: PyTree, masks: Masks) -> jax.Array:
        return eqx.combine(params, rest).loss_of(view, masks, key=jr.key(0))[0]

    return costs.flops(jax.value_and_grad(loss_of), params, rest, *shaped(method, target))


def shaped(method: IJEPA, target: int) -> tuple[PyTree, Masks]:
    """The view and masks of one image as abstract shapes, target blocks of `target` patches."""
    config, targets = method.config, (1, method.config.masks.blocks, target)

    def build() -> tuple[jax.Array, Masks]:
        masks = Masks(
            context=jnp.zeros((1, config.masks.context), jnp.int32),
            targets=jnp.zeros(targets, jnp.int32),
            target_valid=jnp.zeros(targets, jnp.bool_),
        )
        return jnp.zeros((1, *config.crop.size, config.encoder.channels)), masks

    return jax.eval_shape(build)


def say_memory(plan: Plan, say: Say) -> tuple[float, float]:
    """Bytes on a device whatever the batch, and bytes per image."""
    compute, layout = compute_dtype(plan.config), plan.layout
    one, two = (activation_bytes(plan, batch, compute) for batch in (1, 2))
    image, pieces = two - one, layout.pieces
    fixed = fixed_bytes(plan, layout) | {"not per image": max(one - image, 0)}
    if pieces > 1:  # what is kept of each image, and one piece on its way back
        with layout.applied():
            one, two = (activation_bytes(plan, batch * pieces, compute) for batch in (1, 2))
        image = (two - one + image) // pieces
    image += costs.tree_bytes(plan.images(1))
    batch = plan.config.train.batch_size
    share = batch // jax.device_count()
    lies = f"{layout}; " if jax.device_count() > 1 else ""
    say(
        f"\nmemory per device, GB (estimated; {lies}{jnp.dtype(compute).name}, {share} of {batch} images;"
        " the compiler's working space comes on top)"
    )
    whole = sum(fixed.values()) + image * share
    rows = fixed | {"batch and activations": image * share, "in all": whole}
    if jax.device_count() > 1:
        other = dataclasses.replace(layout, parameters=not layout.parameters, teacher=not layout.parameters)
        name = f"in all with train.sharding.parameters={'sharded' if other.parameters else 'replicated'}"
        rows[name] = whole + sum(fixed_bytes(plan, other).values()) - sum(fixed_bytes(plan, layout).values())
    for name, count in rows.items():
        say(f"  {name:<50}{count / 1e9:>8.3f}")
    reading = plan.config.data
    ahead = (reading.threads + 1) * max(reading.workers, 1)
    say(f"batches read ahead: {ahead} at most, {ahead * costs.tree_bytes(plan.images(batch)) / 1e9:.3f} GB on the host")
    return float(sum(fixed.values())), float(image)


def fixed_bytes(plan: Plan, layout: Layout) -> dict[str, int]:
    """Bytes on a device of what does not grow with the batch, but for what the loss itself keeps."""
    method = plan.state.method
    trained = layout.bytes(split(method)[0])
    fixed = {
        "trained parameters": trained,
        "teacher and other": layout.bytes(method) - trained,
        "gradients": trained,
        "optimiser state": layout.bytes(plan.state.opt_state),
        "the method before a step that gets a line": layout.bytes(method),
    }
    if layout.parameters or layout.teacher:
        fixed["gathered for the matrix products"] = gathered_bytes(method, layout, compute_dtype(plan.config))
    return fixed


def gathered_bytes(method: Method, layout: Layout, compute: DTypeLike) -> int:
    """Bytes of what lies split and is gathered, at once: of blocks that are scanned and rematerialised, one."""

    def numbers(tree: PyTree, split: bool) -> int:
        total = 0
        for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, (EMA, BlockStack))):
            if isinstance(node, EMA):
                total += numbers(node.average, layout.teacher)
            elif split:
                one = isinstance(node, BlockStack) and node.scan_layers and node.remat != "none"
                total += count_parameters(node) // (node.depth if one else 1)
        return total

    return numbers(method, layout.parameters) * jnp.dtype(compute).itemsize


def activation_bytes(plan: Plan, batch: int, compute: DTypeLike) -> int:
    """Bytes kept for the backward pass of a batch."""
    params, rest = split(plan.state.method)

    def loss_of(params: Method, rest: Method, images: Images) -> jax.Array:
        return cast(eqx.combine(params, rest), compute).loss(images, key=jr.key(0))[0]

    return costs.saved_bytes(loss_of, params, rest, plan.images(batch))


def take_step(plan: Plan, fixed: float, image: float, say: Say) -> None:
    """One step at the recipe's batch, or at the largest power of two that half of the free memory holds."""
    devices, wanted = jax.device_count(), plan.config.train.batch_size
    room = free_memory() / 2 - fixed
    if room < image:
        say(
            f"\none step: {(fixed + image) / 1e9:.1f} GB for one image is more than half of the"
            f" {free_memory() / 1e9:.1f} GB that are free, so the step was traced, with abstract shapes, and not run"
        )
        return
    fits = min(wanted // devices, 2 ** ((int(room // image)).bit_length() - 1)) * devices
    least = devices * plan.layout.pieces
    why = "half of the free memory holds no more"
    if jax.default_backend() == "cpu" and count_parameters(split(plan.state.method)[0]) > LARGE and fits > LARGE_BATCH:
        fits, why = max(LARGE_BATCH // devices, 1) * devices, "a CPU takes long over this model"
    fits = max(fits // least, 1) * least
    said = "" if fits == wanted else f", not {wanted}: {why}"
    say(f"\none step of {fits} images{said} ...")
    say(run_step(plan, fits))


def run_step(plan: Plan, batch: int) -> str:
    """Takes the first step of the run on its first `batch` pictures, as `train` would, and says how it went."""
    start = time.perf_counter()
    config = dataclasses.replace(plan.config, train=dataclasses.replace(plan.config.train, batch_size=batch))
    mesh = plan.layout.mesh
    images = sharding.shard_batch(next(read(config, plan.source, 1, 0)), mesh)
    state = placed_state(config.method, plan.optimizer, jr.key(config.seed), plan.layout)
    root = sharding.replicate(jr.fold_in(jr.key(config.seed), 1), mesh)
    fixed = Fixed(plan.optimizer, root, compute_dtype(config), config.train.guard, plan.layout, config.train.log_every)
    state, metrics = compiled_step(fixed, images, state)
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (jnp.isfinite(loss) and jnp.isfinite(norm)):
        raise UserError(f"the first step's loss is {loss} and its gradient's norm {norm}; look at optim and method")
    return f"loss {loss:.4f}, gradient norm {norm:.4f}, {time.perf_counter() - start:.0f} s with compilation"


def free_memory() -> float:
    """Bytes free on one device."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats() if device.platform != "cpu" else None:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    whole = found[0] if found else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    limited = [float(limit.read_text())] if limit.exists() and limit.read_text().strip().isdigit() else []
    return min([whole, *limited]) / jax.local_device_count()
