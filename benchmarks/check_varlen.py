"""Check converted models of packed sequences (varlen_attn) on this machine's GPU.

    PYTHONPATH=. python benchmarks/check_varlen.py [--only TEXT] [--jobs N]

The oracle runs the sequences one by one through the converted model's dense twin, in float64. One
row a case: ||x - exact|| / ||exact|| of the output or the gradient that is worst, beside what is
allowed: twice that of the dense twin in the case's own dtype, and rounding. Exits with 1 if a case
fails.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from functools import partial
from typing import Any

import checking
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen

import moda_compile
from moda_compile import MoDAConfig

# Before torch 2.12 it takes fewer keys than queries without being told.
_OPTIONS = inspect.signature(varlen.varlen_attn).parameters
GROUPED = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}
LENGTHS = (300, 1, 77, 515, 64)
WIDTH, HEAD = 256, 64
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Attention(nn.Module):
    """Of sequences packed into x [T, D] if offsets are given, otherwise of one, [1, T, D]."""

    def __init__(self, window: tuple[int, int], kv_heads: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, kv_heads * HEAD)
        self.value = nn.Linear(WIDTH, kv_heads * HEAD)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, offsets: Tensor | None = None, longest: int = 0) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, HEAD)) for f in (self.query, self.key, self.value))
        if offsets is not None:
            options: dict[str, Any] = GROUPED | dict(window_size=self.window)
            y = varlen.varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
        else:
            token = torch.arange(x.shape[1], device=x.device)
            ahead = token - token[:, None]
            seen = ahead <= (self.window[1] if self.window[1] >= 0 else len(token))
            seen = seen & (ahead >= -(self.window[0] if self.window[0] >= 0 else len(token)))
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)
        return x + self.out(y.flatten(-2))


class Model(nn.Module):
    """Four attentions."""

    def __init__(self, window: tuple[int, int], kv_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(window, kv_heads) for _ in range(4))

    def forward(self, x: Tensor, *offsets: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *offsets)
        return x


def results(model: nn.Module, out: Tensor, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    (dx,) = torch.autograd.grad((out * weight).sum(), x, retain_graph=True)
    (out * weight).sum().backward()
    found = {"out": out.detach(), "dx": dx}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(dtype: torch.dtype, window: tuple[int, int], kv_heads: int) -> str:
    """The row of a case; raises if anything is too far off."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int().cuda()
    ends = offsets.tolist()
    x = torch.randn(ends[-1], WIDTH, device="cuda").to(dtype)
    weight = torch.randn_like(x)
    plain = Model(window, kv_heads).cuda().to(dtype)
    packed = moda_compile.convert(
        copy.deepcopy(plain), MoDAConfig(), (x, offsets, max(LENGTHS)), backend="inductor"
    )
    leaf = x.clone().requires_grad_()
    got = results(packed, packed(leaf, offsets, max(LENGTHS)), leaf, weight)

    def one_by_one(to: torch.dtype) -> dict[str, Tensor]:
        torch._dynamo.reset()
        own = x.to(to).requires_grad_()
        alone = moda_compile.convert(
            copy.deepcopy(plain).to(to), MoDAConfig(), (own[None, :5],), backend="eager"
        )
        parts = [alone(own[None, a:b])[0] for a, b in itertools.pairwise(ends)]
        return results(alone, torch.cat(parts), own, weight.to(to))

    exact, dense = one_by_one(torch.float64), one_by_one(dtype)
    errors = {}
    assert got.keys() == exact.keys()
    largest = max(y.norm() for n, y in exact.items() if n != "out")
    for name, true in exact.items():
        size = max(float(true.norm()), 1e-3 * float(largest))  # a key's bias has no gradient
        error, other = (float((z[name].double() - true).norm()) / size for z in (got, dense))
        errors[name] = (error, 2 * other + ROUNDING[dtype])
    return checking.worst(errors)


CASES = (
    (torch.bfloat16, (-1, 0), 2),
    (torch.float16, (-1, 0), 4),
    (torch.bfloat16, (-1, -1), 1),
    (torch.bfloat16, (100, 0), 2),
    (torch.float16, (30, 7), 2),
)


def checks() -> list[checking.Check]:
    """All of them."""
    return [
        (
            f"{str(dtype)[6:]} window {window} G{WIDTH // HEAD // kv_heads}",
            partial(check, dtype, window, kv_heads),
        )
        for dtype, window, kv_heads in CASES
    ]


claims = partial(
    checking.claim,
    "models of packed sequences (`varlen_attn`), forward and all gradients against one by one",
    checks,
)

if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
