"""A small GPT in plain PyTorch: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

It knows nothing of Mixture-of-Depths Attention: the other examples convert it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a :class:`GPT`. ``num_heads`` is a multiple of ``num_kv_heads``."""

    vocab_size: int
    num_layers: int = 8
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_width: int = 352

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads


Cache = tuple[Tensor, Tensor]
"""One layer's keys and values [B, num_kv_heads, longest, head_dim], written in place."""


def rotary_angles(position: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, head_dim / 2] of the rotation of each position [T]."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=position.device) / head_dim)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [B, H, T, head_dim]: channel i together with channel i + head_dim / 2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention; several query heads share one key/value head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_heads != config.num_kv_heads
        kv_width = config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, H * head_dim] -> [B, H, T, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        position: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a cache x are its tokens at ``position`` [T]."""
        query = rotate(self.split_heads(self.query(x)), cos, sin)
        key = rotate(self.split_heads(self.key(x)), cos, sin)
        value = self.split_heads(self.value(x))
        seen = None
        if cache is not None and position is not None:
            key, value = (
                held.index_copy_(2, position, new.to(held.dtype))
                for held, new in zip(cache, (key, value), strict=True)
            )
            seen = torch.arange(key.shape[2], device=x.device) <= position[:, None]
        heads = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=self.grouped
        )
        return self.out(heads.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        position: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), cos, sin, position, cache)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """Decoder-only language model."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def caches(self, batch: int, longest: int) -> list[Cache]:
        """An empty KV cache for each layer, for sequences of up to ``longest`` tokens."""
        config, like = self.config, self.head.weight
        shape = (batch, config.num_kv_heads, longest, config.head_dim)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        position: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """tokens [B, T] (int64) -> logits [B, T, vocab_size].

        With ``caches`` they are the tokens at ``position`` [T], behind those of earlier calls.
        """
        where = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = rotary_angles(where if position is None else position, self.config.head_dim)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, position, None if caches is None else caches[i])
        return self.head(self.norm(x))
