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
    keys: int | None = None,
    d: int = 16,
    dv: int | None = None,
    s: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, depth_k, depth_v, standard normal; by default as many keys as queries, dv = d."""
    generator = torch.Generator().manual_seed(seed)
    sequence, slots = (b, hk, t if keys is None else keys), (s, b, hk, t)
    dv = d if dv is None else dv
    shapes = [(b, hk * groups, t, d), (*sequence, d), (*sequence, dv), (*slots, d), (*slots, dv)]
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def run(
    function: Callable[..., Any],
    tensors: list[Tensor],
    *,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and the gradients of a fixed random projection of out, all in float64.

    The gradients are those of the five tensors, and of the mask if it requires one.
    """
    leaves = [x.detach().requires_grad_() for x in tensors]
    if attn_mask is not None:
        options["attn_mask"] = attn_mask
    out, lse = function(*leaves, **options)
    if attn_mask is not None and attn_mask.requires_grad:
        leaves.append(attn_mask)
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
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.detach().double().requires_grad_(mask.requires_grad)
    exact = run(moda_attention_reference, [x.double() for x in tensors], **options)
    compare(got, exact, dtype)


def compare(got: Any, exact: Any, dtype: torch.dtype) -> None:
    """Error relative to the largest entry (at least 1) of at most 8 + 2 max|lse| roundings.

    8: p, dz, the sequence part, the merged result, and each once more where Hq heads or T tokens
    are summed in another order than the oracle's. 2 max|lse|: a score z and lse each have an error
    of eps * |z|, and p = exp(z - lse) has both as relative error. A mask's gradient is a sum over
    the n scores that share an element: sqrt(n) times that. lse is float32 at least, but ATen's
    exponential for 16-bit inputs is good to 1e-4 on a CPU. Where the exact lse is -inf, so must be
    the other.
    """
    b, heads, t, _ = exact[0].shape
    names = ("out", "lse", *NAMES, "mask")[: 2 + len(exact[2])]
    pairs = zip(names, (*got[:2], *got[2]), (*exact[:2], *exact[2]), strict=True)
    live = exact[1].isfinite()
    scores = exact[1][live].abs().max().item() if live.any() else 0.0
    for name, x, y in pairs:
        assert x.shape == y.shape, name
        wide = torch.promote_types(dtype, torch.float32)
        eps = torch.finfo(wide if name == "lse" else dtype).eps
        if name == "lse":
            assert torch.equal(x[~live], y[~live])
            x, y = x[live], y[live]
        if y.numel():
            error, largest = (x - y).abs().max().item(), max(y.abs().max().item(), 1.0)
            if name == "mask":
                largest *= math.sqrt(b * heads * t * exact[2][1].shape[2] / y.numel())
            slack = 2e-4 if name == "lse" and dtype != wide else 0.0
            assert error <= (8 + 2 * scores) * eps * largest + slack, (name, error, largest)


def visible(kind: str, b: int, heads: int, t: int) -> Tensor:
    """A bool mask (True attends) that broadcasts to [B, Hq, T, T], of a kind that models have."""
    row, column = torch.arange(t)[:, None], torch.arange(t)[None, :]
    batch = torch.arange(b)[:, None, None, None]
    causal = column <= row
    if kind == "causal":
        return causal
    if kind == "window":
        return causal & (row - column < 3)
    if kind == "prefix":
        return (causal | (column < 4))[None]
    if kind == "right padding":  # nobody sees the padding; it sees the tokens
        return (column < t - 2 * batch).reshape(b, 1, 1, t)
    if kind == "left padding":  # with causality: the padding's own rows see nothing
        return causal & (column >= 2 * batch + 1)
    if kind == "packed":  # documents of three tokens, the batch entries out of step
        return (row + batch) // 3 == (column + batch) // 3
    if kind == "head by head":
        return causal & ((row - column) % (1 + torch.arange(heads)[:, None, None]) == 0)
    if kind == "expanded":
        return (causal & (column >= batch)).expand(b, heads, t, t)
    if kind == "rows":
        return (row % 3 != 1)[None, None]
    if kind == "nothing":
        return torch.tensor(False)
    raise ValueError(kind)


KINDS = (
    "causal", "window", "prefix", "right padding", "left padding", "packed", "head by head",
    "expanded", "rows", "nothing",
)  # fmt: skip


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


class Largest:
    """The largest single allocation on the CPU, ATen's own scratch memory included."""

    def __enter__(self) -> Largest:
        self.profile = torch.profiler.profile(profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.profile.__exit__(*exception)
        events = self.profile.profiler.kineto_results.events()
        self.bytes = max(e.nbytes() for e in events if e.name() == "[memory]")
