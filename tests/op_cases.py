"""Inputs for tests of the operators, and the comparison with the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moda_compile import moda_attention
from moda_compile.testing import moda_attention_reference

NAMES = ("q", "k", "v", "depth_k", "depth_v")


def make(
    *,
    b: int = 2,
    hk: int = 2,
    groups: int = 2,
    t: int = 7,
    d: int = 16,
    s: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, depth_k, depth_v, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, hk * groups, t, d), (b, hk, t, d), (b, hk, t, d)] + [(s, b, hk, t, d)] * 2
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def run(
    function: Callable[..., Any], tensors: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and the five gradients of a fixed random projection of out, all in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(tensors[0].dtype)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves]
    found = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
    return out.detach().double(), lse.detach().double(), [g.double() for g in found]


def moda(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return moda_attention(*tensors, **options, return_lse=True)


def check(tensors: list[Tensor], **options: Any) -> None:
    """Forward, lse and every gradient against the oracle in float64 on the very same inputs."""
    dtype = tensors[0].dtype
    got = run(moda, tensors, **options)
    exact = run(moda_attention_reference, [x.double() for x in tensors], **options)
    compare(got, exact, dtype)


def compare(got: Any, exact: Any, dtype: torch.dtype) -> None:
    """Error relative to the largest entry (at least 1) of at most 8 + 2 max|lse| roundings.

    8: p, dz, the sequence part, the merged result, and each once more where Hq heads or T tokens
    are summed in another order than the oracle's. 2 max|lse|: a score z and lse each have an error
    of eps * |z|, and p = exp(z - lse) has both as relative error. lse is float32 at least.
    """
    pairs = zip(("out", "lse", *NAMES), (*got[:2], *got[2]), (*exact[:2], *exact[2]), strict=True)
    scores = exact[1].abs().max().item() if exact[1].numel() else 0.0
    for name, x, y in pairs:
        assert x.shape == y.shape, name
        wide = torch.promote_types(dtype, torch.float32)
        eps = torch.finfo(wide if name == "lse" else dtype).eps
        if y.numel():
            error, largest = (x - y).abs().max().item(), max(y.abs().max().item(), 1.0)
            assert error <= (8 + 2 * scores) * eps * largest, (name, error, largest)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    order = list(reversed(range(x.dim())))
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)
    wide[..., 1::2] = x
    token_major = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    offset = torch.cat([x.new_full((3,), math.nan), x.flatten()])[3:].view(x.shape)
    return {
        "reversed": x.permute(order).contiguous().permute(order),
        "every second": wide[..., 1::2],
        "token major": token_major,
        "offset": offset,
    }
