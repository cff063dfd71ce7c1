"""A decoder whose blocks may be checkpointed in every way, for the tests of regions and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import moda_compile.ops  # noqa: F401 - registers them

KEPT = (
    torch.ops.moda_compile.depth_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def keep_attention(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing that recomputes everything but the attention."""
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, keep_attention)


def plainly(block: nn.Module, *args: Any) -> Tensor:
    """Not checkpointed at all."""
    return block(*args)


def nested(block: nn.Module, *args: Any) -> Tensor:
    """A checkpoint in a checkpoint."""

    def inner(*args: Any) -> Tensor:
        return checkpoint(block, *args, use_reentrant=False) * 1.0

    return checkpoint(inner, *args, use_reentrant=False)


How = Callable[..., Tensor]
WAYS: dict[str, How] = {
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "selective": functools.partial(checkpoint, use_reentrant=False, context_fn=selective),
    "nested": nested,
}


class Attention(nn.Module):
    """Causal attention over rotated queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin
                for t in (q, k))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.ffn = Attention(width, heads), FFN(width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), cos, sin)
        return x + self.ffn(self.norms[1](x))


class Decoder(nn.Module):
    """``how(block, x, cos, sin)`` runs each block."""

    def __init__(
        self, how: How = plainly, layers: int = 3, width: int = 32, heads: int = 4
    ) -> None:
        super().__init__()
        self.how, self.head_dim = how, width // heads
        self.embedding, self.head = nn.Embedding(29, width), nn.Linear(width, 29)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def start(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden state [B, T, D], and the rotation's cos and sin [T, d]."""
        x = self.embedding(ids)
        frequency = 0.5 ** torch.arange(self.head_dim // 2, dtype=x.dtype, device=x.device)
        angle = torch.arange(ids.shape[1], dtype=x.dtype, device=x.device)[:, None] * frequency
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        return x, cos, sin

    def forward(self, ids: Tensor) -> Tensor:
        x, cos, sin = self.start(ids)
        for block in self.blocks:
            x = self.how(block, x, cos, sin)
        return self.head(x)


def decoder(how: How = plainly, **options: Any) -> Decoder:
    """In float64 and with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(how, **options).double()
