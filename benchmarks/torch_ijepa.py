"""An I-JEPA training step in plain PyTorch, eager or compiled, written from the published description.

It does the same arithmetic as ours, in the forms that PyTorch is fastest at: fused attention, fused AdamW, autocast to
bfloat16, patches chosen before they are embedded, no gradient through the teacher, and in the predictor's last block
only the target tokens. Nothing here imports jax: `compare_torch.py` copies our weights.

Source: Assran et al. 2023, arXiv:2301.08243, section 3 and appendix A.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedules:
    """Learning rate (linear, cosine), weight decay (cosine) and momentum (linear) of `total` steps, as published."""

    total: int
    warmup: int
    start_lr: float = 2e-4
    peak_lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.996

    def learning_rate(self, step: int) -> float:
        """Linear to the peak in `warmup` steps, then a cosine to the end; `step` counts from 1."""
        if step < self.warmup:
            return self.start_lr + (self.peak_lr - self.start_lr) * step / self.warmup
        fraction = (step - self.warmup) / (self.total - self.warmup)
        return self.final_lr + (self.peak_lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * fraction))

    def decay(self, step: int) -> float:
        """Cosine over the whole run; `step` counts from 1."""
        fraction = 0.5 * (1 + math.cos(math.pi * step / self.total))
        return self.final_weight_decay + (self.weight_decay - self.final_weight_decay) * fraction

    def teacher_momentum(self, step: int) -> float:
        """Linear to 1 over the whole run; `step` counts from 0."""
        return self.momentum + (1 - self.momentum) * step / self.total


class Block(nn.Module):
    """A pre-norm transformer block. With `last`, it returns only the last tokens, which attend to every token."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) as (batch, heads, tokens, channels)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _projections(self, x: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor]:
        dim = x.shape[-1]
        if last == x.shape[1]:
            return self.qkv(x).split(dim, dim=-1)
        query = F.linear(x[:, -last:], self.qkv.weight[:dim], self.qkv.bias[:dim])
        return query, *F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).split(dim, dim=-1)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        last = x.shape[1] if last is None else last
        mixed = F.scaled_dot_product_attention(*map(self._heads, self._projections(self.norm1(x), last)))
        x = x[:, -last:] + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def take_patches(tokens: Tensor, indices: Tensor) -> Tensor:
    """The tokens (batch, patches, dim) at the indices (batch, n)."""
    return tokens.take_along_dim(indices[..., None], dim=1)


class Encoder(nn.Module):
    """A vision transformer without a class token, on all patches or on those of the indices `keep`."""

    def __init__(self, pixels: int, dim: int, depth: int, heads: int, hidden: int, positions: np.ndarray):
        super().__init__()
        self.embed, self.norm = nn.Linear(pixels, dim), nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.register_buffer("positions", torch.tensor(positions))

    def forward(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        positions = self.positions
        if keep is not None:
            patches, positions = take_patches(patches, keep), positions[keep]
        x = self.embed(patches) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """One pass per target block, on the context's tokens and the block's mask tokens; all passes make one batch."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, encoder_dim: int, positions: np.ndarray):
        super().__init__()
        self.embed, self.proj = nn.Linear(encoder_dim, dim), nn.Linear(dim, encoder_dim)
        self.mask_token, self.norm = nn.Parameter(torch.zeros(1, dim)), nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.register_buffer("positions", torch.tensor(positions))

    def forward(self, context: Tensor, seen: Tensor, targets: Tensor) -> Tensor:
        """Predictions (batch, blocks, target, encoder dim) of the `targets` (batch, blocks, target)."""
        context = self.embed(context) + self.positions[seen]
        queries = self.mask_token + self.positions[targets]
        x = torch.cat([context[:, None].expand(-1, targets.shape[1], -1, -1), queries], dim=2).flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, last=targets.shape[2])
        return self.proj(self.norm(x)).unflatten(0, targets.shape[:2])


class TorchIJEPA:
    """Networks, AdamW and teacher; `step` is one update and returns the loss as a tensor."""

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        schedules: Schedules,
        patch: int,
        *,
        half: bool = False,
        compiled: bool = False,
    ):
        """`half`: matrix products in bfloat16, by autocast. `compiled`: forward and backward by `torch.compile`."""
        self.encoder, self.predictor, self.schedules, self.patch = encoder, predictor, schedules, patch
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        weights = [p for net in (encoder, predictor) for p in net.parameters() if p.ndim > 1]
        others = [p for net in (encoder, predictor) for p in net.parameters() if p.ndim == 1]
        self.adamw = torch.optim.AdamW([{"params": weights}, {"params": others}], fused=True)
        self.count, self.half = 0, half
        self.forward = torch.compile(self.loss) if compiled else self.loss

    def patchify(self, view: Tensor) -> Tensor:
        """Row-major patches (batch, patches, pixels) of a view (batch, height, width, channels)."""
        split = view.unflatten(2, (-1, self.patch)).unflatten(1, (-1, self.patch))
        return split.transpose(2, 3).flatten(3).flatten(1, 2)

    def loss(self, view: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Mean smooth L1 (beta 1) between predictions and the teacher's normalized embeddings of the targets."""
        patches = self.patchify(view)
        with torch.no_grad():
            embedded = self.teacher(patches)
            embedded = F.layer_norm(embedded, embedded.shape[-1:], eps=1e-6)
            wanted = take_patches(embedded, targets.flatten(1)).unflatten(1, targets.shape[1:])
        return F.smooth_l1_loss(self.predictor(self.encoder(patches, context), context, targets), wanted, beta=1.0)

    def step(self, view: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """One update of the networks and then of the teacher."""
        decays = (self.schedules.decay(self.count + 1), 0.0)
        for group, decay in zip(self.adamw.param_groups, decays, strict=True):
            group.update(lr=self.schedules.learning_rate(self.count + 1), weight_decay=decay)
        self.adamw.zero_grad(set_to_none=True)
        with torch.autocast(view.device.type, torch.bfloat16, enabled=self.half):
            loss = self.forward(view, context, targets)
        loss.backward()
        self.adamw.step()
        self._move_teacher(self.schedules.teacher_momentum(self.count))
        self.count += 1
        return loss.detach()

    @torch.no_grad()
    def _move_teacher(self, momentum: float) -> None:
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1.0 - momentum)
