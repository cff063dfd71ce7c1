"""The plain stacks that whole-model benchmarks convert: decoder blocks, no embedding, no head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Shape:
    """layers L, width D, heads Hq, kv_heads Hk, head_dim d, ffn: width of the SwiGLU's inside."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    batch: int = 1
    tokens: int = 2048

    def __str__(self) -> str:
        heads = f"{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        return f"{self.layers} layers, D={self.width}, {heads} heads of {self.head_dim}"

    def inputs(self, device: str, dtype: torch.dtype) -> Tensor:
        """Hidden states [B, T, D], and a gradient for them as an embedding's would be."""
        size = (self.batch, self.tokens, self.width)
        return torch.randn(size, device=device, dtype=dtype, requires_grad=True)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.query = nn.Linear(width, queries, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, keys, bias=False)
        self.out = nn.Linear(queries, width, bias=False)
        self.gate = nn.Linear(width, shape.ffn, bias=False)
        self.up = nn.Linear(width, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        b, t, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(b, t, -1, self.shape.head_dim).transpose(1, 2)

        normed = self.norms[0](x)
        query, key, value = (heads(f(normed)) for f in (self.query, self.key, self.value))
        query, key = (turned(y, cosine, sine) for y in (query, key))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, -1))
        normed = self.norms[1](x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of x [B, H, T, d]; cosine, sine [T, d / 2]."""
    one, two = x.chunk(2, -1)
    return torch.cat((one * cosine - two * sine, two * cosine + one * sine), -1)


class Stack(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        half = torch.arange(shape.head_dim // 2) / (shape.head_dim // 2)
        angle = torch.arange(shape.tokens)[:, None] * 10000.0**-half
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return x
