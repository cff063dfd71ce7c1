"""Check depth slots merged into a given attention, and masks in compiled code, on this GPU.

    PYTHONPATH=. python benchmarks/check_merge.py [--only TEXT] [--jobs N]

Rows as of check_gpu.py: errors of out, lse and every gradient against float64, beside the worst
allowed. FlexAttention is the real one, compiled. Exits with 1 if a case fails.
"""

import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checking
import torch
from check_gpu import BF16, BUDGET, DEVICE, FP16, FP32, FP64, oracle, relative, tensor
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moda_compile import moda_attention, ops
from moda_compile.kernels import split


def verdict(names: str, got: Any, exact: Any, eager: Any, dtype: torch.dtype) -> str:
    """The row of a check: errors beside what is allowed, eager's own + rounding."""
    budget = BUDGET[dtype]
    return checking.verdict(
        {
            name: (relative(x, y), relative(z, y) + budget)
            for name, x, y, z in zip(names.split(), got, exact, eager, strict=True)
        }
    )


def merged_by_hand(
    out: Tensor, lse: Tensor, q: Tensor, depth_k: Tensor, depth_v: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition: the sequence part is one more key, of score lse and value out."""
    group = q.shape[1] // depth_k.shape[2]
    depth_k, depth_v = (x.repeat_interleave(group, 2) for x in (depth_k, depth_v))
    z = torch.einsum("bhtd,sbhtd->bhts", q, depth_k) * scale
    z = torch.cat([lse.unsqueeze(-1).to(z.dtype), z], -1)
    p = z.softmax(-1)
    joint = p[..., :1] * out + torch.einsum("bhts,sbhtd->bhtd", p[..., 1:], depth_v)
    return joint, z.logsumexp(-1)


def check_merge(dtype: torch.dtype, d: int, g: int, s: int, layout: str) -> str:
    """`merge` and its backward; some rows of the sequence part see no key."""
    torch.manual_seed(0)
    b, hk, t, scale = 2, 2, 131, d**-0.5
    wide = FP64 if dtype == FP64 else FP32
    out, q, grad = (tensor((b, hk * g, t, d), layout, dtype) for _ in range(3))
    lse = torch.randn(b, hk * g, t, device=DEVICE, dtype=wide) + 3
    lse[:, :, ::3] = -math.inf
    out = out * (lse > -math.inf).unsqueeze(-1)
    depth_k, depth_v = ([tensor((b, hk, t, d), layout, dtype) for _ in range(s)] for _ in range(2))
    acc = torch.randn(s + 2, 2, b, t, hk, d, device=DEVICE, dtype=wide).transpose(3, 4)
    before = acc.clone()
    joint, joint_lse = split.merge(out, lse, q, depth_k, depth_v, scale=scale)
    saved = (grad, out, lse, q, depth_k, depth_v, joint, joint_lse, acc)
    made = split.merge_backward(*saved, scale=scale)
    assert torch.equal(acc[s:], before[s:]), "rows past the last slot changed"
    got = [joint, joint_lse, *made, acc[:s, 0], acc[:s, 1]]

    def reference(compute: torch.dtype) -> list[Tensor]:
        given = (out, lse, q, torch.stack(depth_k), torch.stack(depth_v))
        leaves = [x.detach().to(compute).requires_grad_() for x in given]
        leaves[1] = lse.to(torch.promote_types(compute, FP32)).requires_grad_()
        exact, exact_lse = merged_by_hand(*leaves, scale=scale)
        grads = list(torch.autograd.grad(exact, leaves, grad.to(exact.dtype)))
        grads[3:] = [grads[3] + before[:s, 0], grads[4] + before[:s, 1]]
        return [exact, exact_lse, *grads]

    names = "out lse dOut dLse dq dK dV"
    return verdict(names, got, reference(FP64), reference(dtype), dtype)


def slopes_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score - 0.05 * (h + 1) * (i - j).abs()


def late_keys(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j >= 5)  # the first five tokens see nothing


def check_flex(dtype: torch.dtype) -> str:
    """Compiled FlexAttention (score_mod, block_mask, GQA) and `join`: every gradient."""
    torch.manual_seed(0)
    b, hk, g, t, d, s, scale = 2, 2, 4, 257, 64, 3, 0.125
    q, grad = (tensor((b, hk * g, t, d), "token_major", dtype) for _ in range(2))
    k, v = (tensor((b, hk, t, d), "token_major", dtype) for _ in range(2))
    depth = [torch.randn(s, b, hk, t, d, device=DEVICE).to(dtype) for _ in range(2)]
    block = create_block_mask(late_keys, None, None, t, t, device=DEVICE)
    slots_dtype = ops.accumulator_dtype(dtype, "float32")

    def joined(q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor) -> Tensor:
        own = flex_attention(
            q, k, v, slopes_bias, block_mask=block, scale=scale, enable_gqa=True, return_lse=True
        )
        keys, values = list(depth_k.unbind(0)), list(depth_v.unbind(0))
        token = None
        for i in range(s):
            token = torch.ops.moda_compile.write_slot(token, keys[i], values[i], i, s, slots_dtype)
        out: Tensor = torch.ops.moda_compile.join(*own, q, token, keys, values, scale)[0]
        return out

    row, column = torch.arange(t, device=DEVICE)[:, None], torch.arange(t, device=DEVICE)[None, :]
    head = torch.arange(1, hk * g + 1, device=DEVICE, dtype=FP64)[:, None, None]
    bias = -0.05 * head * (row - column).abs()
    bias = bias.masked_fill(~((column <= row) & (column >= 5)), -math.inf)

    def gradients(function: Callable[..., Tensor], compute: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(compute).requires_grad_() for x in (q, k, v, *depth)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(compute))]

    def by_hand(*x: Tensor) -> Tensor:
        return oracle(*x, causal=False, scale=scale, mask=bias.to(x[0].dtype))[0]

    torch._dynamo.reset()
    got = gradients(torch.compile(joined, fullgraph=True, dynamic=False), dtype)
    exact, eager = gradients(by_hand, FP64), gradients(by_hand, dtype)
    return verdict("out dq dk dv dK dV", got, exact, eager, dtype)


def check_compiled(kind: str, dtype: torch.dtype) -> str:
    """The public operator with a mask, compiled by Inductor, for two lengths in one graph."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(*x: Tensor, mask: Tensor) -> Any:
        return moda_attention(*x, is_causal=False, attn_mask=mask)

    worst = 0.0
    for t in (130, 257):
        torch.manual_seed(0)
        inputs = [tensor((3, h, t, 64), "slice", dtype) for h in (8, 4, 4)]
        inputs += [torch.randn(5, 3, 4, t, 64, device=DEVICE).to(dtype) for _ in range(2)]
        if kind == "bool":
            mask = torch.ones(t, t, dtype=torch.bool, device=DEVICE).tril(-1)[None, None]
        else:
            mask = torch.randn(1, 8, t, t, device=DEVICE).to(dtype).requires_grad_()
        leaves = [x.requires_grad_() for x in inputs]
        wanted = [*leaves, mask] if mask.requires_grad else leaves
        grad = torch.randn(3, 8, t, 64, device=DEVICE).to(dtype)
        got = compiled(*leaves, mask=mask)
        eager: Any = moda_attention(*leaves, is_causal=False, attn_mask=mask)
        pairs = [
            (got, eager),
            *zip(
                torch.autograd.grad(got, wanted, grad),
                torch.autograd.grad(eager, wanted, grad),
                strict=True,
            ),
        ]
        worst = max(worst, *(relative(x, y.detach().double()) for x, y in pairs))
    # The same kernels, but for atomics: the order in which dq and dk are summed.
    assert worst < 2 * BUDGET[dtype], f"differs by {worst:.1e}"
    return f"{worst:.0e}"


def checks() -> list[checking.Check]:
    """All of them."""
    shapes = [
        (BF16, 64, 4, 5), (BF16, 64, 1, 33), (BF16, 76, 2, 5), (FP16, 128, 2, 1),
        (FP32, 64, 2, 5), (FP64, 64, 2, 5), (BF16, 257, 1, 3),
    ]  # fmt: skip
    found: list[checking.Check] = []
    for (dtype, d, g, s), layout in itertools.product(shapes, ("token_major", "dim_major")):
        name = f"merge {str(dtype)[6:]:8} d{d} G{g} S{s} {layout}"
        found.append((name, partial(check_merge, dtype, d, g, s, layout)))
    for dtype in (BF16, FP32):
        found.append((f"FlexAttention and join {str(dtype)[6:]}", partial(check_flex, dtype)))
        for kind in ("bool", "learned"):
            name = f"torch.compile, {kind} mask {str(dtype)[6:]}"
            found.append((name, partial(check_compiled, kind, dtype)))
    return found


claims = partial(
    checking.claim,
    "depth merged into FlexAttention through its lse, and masks under `torch.compile`",
    checks,
)

if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
