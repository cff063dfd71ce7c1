"""What each idea of a depth kernel is worth, on this machine's GPU: arXiv 2603.15619's ablation.

    PYTHONPATH=. python benchmarks/ablation.py [--tokens 1024] [--slots 64]

Forward + backward, B=1, bf16, causal, G=8, 64 query heads, d=64, within one run:

- naive: the definition, one einsum over the slots and one softmax over all scores, by autograd;
- flattened: slots laid out as T S more keys, [T, T S] scores of which all but S a row are masked;
- chunk-aware: the same in chunks of 64 tokens, [64, 64 S] scores each;
- group-aware: chunks of 64 rows (token, query head of a group), which have 64 / G tokens;
- ours.

The three between are PyTorch's own matrix products with the platform's attention and its lse for
the sequence, merged exactly; they waste what the paper's layouts waste, in its order.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from results import add_arguments, publish
from torch import Tensor
from tqdm import tqdm

from moda_compile import moda_attention
from moda_compile.testing import moda_attention_reference

DTYPE = torch.bfloat16
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def naive(q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor) -> Tensor:
    return moda_attention_reference(q, k, v, depth_k, depth_v, is_causal=True)[0]


def blocked(rows_of: Callable[[int], int]) -> Attention:
    """Depth scores in blocks of tokens, each against the slots of all its tokens, masked.

    rows_of: tokens a block, by the group.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor) -> Tensor:
        b, hq, t, d = q.shape
        slots, hk = depth_k.shape[0], k.shape[1]
        group, scale = hq // hk, d**-0.5
        size = min(rows_of(group), t)
        blocks = t // size
        out, lse = SequenceAttention.apply(q, k, v, scale)
        # [B, Hk, block, G tokens, d] by [.., tokens S, d]: all but a token's own slots masked.
        grouped = (b, hk, group, blocks, size)
        query = q.reshape(*grouped, d).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        keys, values = (
            x.permute(1, 2, 3, 0, 4).reshape(b, hk, blocks, size * slots, d)
            for x in (depth_k, depth_v)
        )
        token = torch.arange(size, device=q.device)
        seen = token.repeat(group)[:, None] == token.repeat_interleave(slots)[None, :]
        z = (query @ keys.mT).float().mul(scale).masked_fill(~seen, -math.inf)
        own = lse.reshape(grouped).permute(0, 1, 3, 2, 4).flatten(3, 4)
        joint = torch.logaddexp(z.logsumexp(-1), own)
        p = (z - joint.unsqueeze(-1)).exp().to(q.dtype)
        weight = (own - joint).exp().unsqueeze(-1)
        first = out.reshape(*grouped, d).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        made = p @ values + weight * first
        back = made.unflatten(3, (group, size)).permute(0, 1, 3, 2, 4, 5)
        return back.reshape(q.shape).to(q.dtype)

    return attention


class SequenceAttention(torch.autograd.Function):
    """The platform's attention with its lse, both differentiable."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        from moda_compile.kernels import choose, sequence

        name = choose(device_type="cuda", dtype=q.dtype, head_dim=q.shape[3]).sequence
        out, lse = sequence.forward(name, q, k, v, is_causal=True, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.name, ctx.scale = name, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        from moda_compile.kernels import sequence

        q, k, v, out, lse = ctx.saved_tensors
        # dz = p (do . v - (do . o - dlse)): an out that has that product with do.
        size = grad_out.float().square().sum(-1, keepdim=True).clamp(min=1e-30)
        shifted = out - (grad_out * (grad_lse.unsqueeze(-1) / size)).to(out.dtype)
        grads = sequence.backward(
            ctx.name, grad_out, q, k, v, shifted, lse, is_causal=True, scale=ctx.scale
        )
        return *grads[:3], None


def ours(q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor) -> Tensor:
    out = moda_attention(q, k, v, depth_k, depth_v, is_causal=True)
    assert isinstance(out, Tensor)
    return out


VARIANTS: tuple[
    tuple[str, float | None, Attention], ...
] = (  # and the paper's milliseconds on an A100
    ("naive PyTorch", 2128.9, naive),
    ("flattened layout", 13.1, blocked(lambda group: 1 << 30)),
    ("chunk-aware", 6.29, blocked(lambda group: 64)),
    ("group-aware", 1.46, blocked(lambda group: max(1, 64 // group))),
    ("ours", None, ours),
)


def main() -> None:
    """Check against the definition in float32, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=64)
    add_arguments(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("ablation: no CUDA device.")
    torch.manual_seed(0)
    hq, hk, d = 64, 8, 64

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=DTYPE)

    t, slots = args.tokens, args.slots
    inputs = [make(1, t, n, d).transpose(1, 2) for n in (hq, hk, hk)]
    inputs += [make(slots, 1, t, hk, d).transpose(2, 3) for _ in range(2)]
    leaves = [x.requires_grad_() for x in inputs]
    grad = make(1, hq, t, d)
    exact = torch.autograd.grad(naive(*(x.float() for x in leaves)), leaves, grad.float())
    rows = []
    for name, paper, attention in tqdm(VARIANTS, desc="variants"):

        def step(attention: Attention = attention) -> tuple[Tensor, ...]:
            return torch.autograd.grad(attention(*leaves), leaves, grad)

        try:
            worst = max(
                ((x.float() - y).norm() / y.norm()).item()
                for x, y in zip(step(), exact, strict=True)
            )
            if not worst < 0.05:
                raise AssertionError(f"{name}: gradients are off by {worst:.1e}")
            taken: float | None = triton.testing.do_bench(step, rep=200, return_mode="median")
        except torch.OutOfMemoryError:
            worst, taken = math.nan, None
        torch.cuda.empty_cache()
        rows.append({"variant": name, "ms": taken, "error": worst, "paper's ms (A100)": paper})
    last = rows[-1]["ms"]
    for found in rows:
        found["of ours"] = None if found["ms"] is None else found["ms"] / last
    said = ", ".join(f"{x['variant']} {x['ms']:.3g}" for x in rows if x["ms"] is not None)
    publish(
        "ablation",
        "What each idea of a depth kernel is worth, forward + backward",
        rows,
        claims=[(f"kernel ablation, T={t}, L={slots}, G=8, ms", said)],
        setting=f"bf16, causal, B=1, T={t}, L={slots}, Hq=64, Hk=8, d=64; through autograd",
        folder=args.out,
    )


if __name__ == "__main__":
    main()
