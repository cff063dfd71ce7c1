"""Check the decode kernels against a float64 oracle on this machine's GPU.

    PYTHONPATH=. python benchmarks/check_decode.py [--only TEXT] [--jobs N]

One row a case: relative errors of out and lse, beside the worst allowed one (eager's own error in
the same precision + rounding). Exits with 1 if a case fails.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checking
import torch
from check_gpu import BF16, BUDGET, DEVICE, FP16, FP32, FP64, relative, tensor
from torch import Tensor

from moda_compile.kernels import decode, slot_table, visible

SLOTS = ("listed", "table", "stacked")
LAYOUTS = ("token_major", "head_major", "slice", "odd_offset", "dim_major")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. queries Tq, keys Tk, s slots; splits: None for the kernel's own choice."""

    dtype: torch.dtype = BF16
    b: int = 2
    hk: int = 2
    g: int = 4
    queries: int = 1
    keys: int = 515
    d: int = 64
    s: int = 17
    slots: str = "listed"
    causal: bool = False
    mask: str = ""
    layout: str = "token_major"
    splits: int | None = None

    def __str__(self) -> str:
        shape = f"B{self.b} Hk{self.hk} G{self.g} Tq{self.queries} Tk{self.keys} d{self.d}"
        seen = "causal" if self.causal else self.mask or "full"
        splits = "" if self.splits is None else f" splits {self.splits}"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind:8} {shape} S{self.s} {self.slots} {self.layout} {seen}{splits}"


def cases() -> Iterator[Case]:
    """Dtypes, head dims, groups, numbers of queries, keys and slots, layouts, masks, splits."""
    base = Case()
    for dtype, slots, causal in itertools.product((BF16, FP16, FP32), SLOTS, (False, True)):
        yield replace(base, dtype=dtype, slots=slots, causal=causal, queries=3)
    for d, dtype in itertools.product((1, 16, 24, 64, 80, 128, 192, 256), (BF16, FP32)):
        yield replace(base, d=d, dtype=dtype)
    for g, queries in itertools.product((1, 3, 8, 32), (1, 2, 5, 16)):
        yield replace(base, g=g, queries=queries, causal=True)
    for d, dtype in itertools.product((128, 256), (BF16, FP32)):
        yield replace(base, g=8, queries=16, d=d, dtype=dtype, mask="alibi")
        yield replace(base, g=8, queries=16, d=d, dtype=dtype, mask="bool")
    for s, slots in itertools.product((0, 1, 32, 33, 64), SLOTS):
        yield replace(base, s=s, slots=slots)
    for keys, s in itertools.product((0, 1, 63, 64, 65, 5000), (0, 5)):
        yield replace(base, keys=keys, s=s)
    for layout in (*LAYOUTS, "cache", "mixed"):
        yield replace(base, layout=layout, queries=2, causal=True)
        yield replace(base, layout=layout, dtype=FP32, d=24, mask="position")
    masks = ("position", "padding", "bool", "-inf", "smallest", "smallest64", "alibi", "alibi64")
    for mask, queries, s in itertools.product(masks, (1, 5), (0, 5)):
        yield replace(base, mask=mask, queries=queries, s=s)
    for dtype in (BF16, FP16, FP32):
        yield replace(base, dtype=dtype, mask="alibi", queries=3, g=1)
    for mask, g, splits in itertools.product(("position", "padding", "far"), (1, 4), (None, 1)):
        yield replace(base, mask=mask, g=g, keys=9001, splits=splits)
    for splits in (1, 2, 9):
        yield replace(base, splits=splits, queries=2, causal=True)
        yield replace(base, splits=splits, queries=2, mask="smallest", s=0)
    for b, keys in itertools.product((1, 8, 64), (2048, 16384)):
        yield replace(base, b=b, hk=3, g=3, keys=keys, s=29, mask="position")  # SmolLM2-135M's
        yield replace(base, b=b, hk=3, g=3, keys=keys, s=29, causal=True, layout="head_major")


def make_mask(case: Case) -> Tensor | None:
    """The case's mask; but for "position" and "padding" the first row sees no key at all."""
    heads = case.hk * case.g
    column = torch.arange(case.keys, device=DEVICE)[None, :]
    row = torch.arange(case.queries, device=DEVICE)[:, None]
    batch = torch.arange(case.b, device=DEVICE)[:, None, None, None]
    visible = (column <= row + case.keys - case.queries) & (row > 0) & (column >= batch)
    if case.mask == "position":
        return (column <= case.keys // 2)[None, None]
    if case.mask == "far":  # on both sides of where rows are looked at apart, with a hole
        return ((column > 8000) & (column != 8500))[None, None]
    if case.mask == "padding":
        return (column >= 3 * batch).expand(case.b, 1, case.queries, case.keys)
    if case.mask == "bool":
        return visible
    if case.mask == "-inf":
        return torch.zeros(visible.shape, device=DEVICE).masked_fill(~visible, -math.inf)
    if case.mask.startswith("smallest"):
        dtype = FP64 if case.mask.endswith("64") else FP32
        zeros = torch.zeros(visible.shape, device=DEVICE, dtype=dtype)
        return zeros.masked_fill(~visible, torch.finfo(dtype).min)
    if case.mask.startswith("alibi"):
        slopes = torch.linspace(0.01, 0.5, heads, device=DEVICE)[:, None, None]
        dtype = FP64 if case.mask.endswith("64") else case.dtype
        return (slopes * (column - row).abs().neg()).to(dtype)[None]
    return None


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, batch entry by batch entry; shapes as of `decode.run`, slots stacked."""
    (b, hq, queries, d), (hk, keys) = q.shape, k.shape[1:3]
    outs, lses = [], []
    for i in range(b):
        grouped = q[i].reshape(hk, hq // hk, queries, d)
        z = grouped @ k[i].unsqueeze(1).mT * scale
        if is_causal:
            row = torch.arange(queries, device=DEVICE)[:, None]
            future = torch.arange(keys, device=DEVICE) > row + keys - queries
            z = z.masked_fill(future, -math.inf)
        if mask is not None:
            own = mask.expand(b, hq, queries, keys)[i].reshape(z.shape)
            z = z.masked_fill(~own, -math.inf) if mask.dtype == torch.bool else z + own
        depth = torch.einsum("hgtd,shtd->hgts", grouped, depth_k[:, i]) * scale
        z = torch.cat([z, depth], -1)
        dead = (z == -math.inf).all(-1, keepdim=True)
        p = z.masked_fill(dead, 0.0).softmax(-1) if z.shape[-1] else z
        p = p.masked_fill(dead, 0.0)
        out = p[..., :keys] @ v[i].unsqueeze(1)
        out = out + torch.einsum("hgts,shtd->hgtd", p[..., keys:], depth_v[:, i])
        outs.append(out.reshape(hq, queries, d))
        lses.append(z.logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf).reshape(hq, queries))
    return torch.stack(outs), torch.stack(lses)


def laid_out(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """A random tensor [B, H, T, d]; "cache": of a longer static cache, NaN where it is unused."""
    if layout != "cache":
        return tensor(shape, layout, dtype)
    b, h, t, d = shape
    buffer = torch.full((b, h, t + 129, d), math.nan, device=DEVICE, dtype=dtype)
    buffer[:, :, :t] = torch.randn(shape, device=DEVICE)
    return buffer[:, :, :t]


def check(case: Case) -> str:
    """Errors beside what is allowed; the memory of the results is NaN before."""
    torch.manual_seed(0)
    layouts: Iterator[str] = itertools.repeat(case.layout)
    if case.layout == "mixed":
        layouts = itertools.cycle(LAYOUTS)
    kv, slot = (case.b, case.hk, case.keys, case.d), (case.b, case.hk, case.queries, case.d)
    own = (case.b, case.hk * case.g, case.queries, case.d)
    q = laid_out(own, next(layouts), case.dtype)
    k, v = (laid_out(kv, next(layouts), case.dtype) for _ in range(2))
    depth = [laid_out(slot, next(layouts), case.dtype) for _ in range(2 * case.s)]
    empty = torch.empty(0, *slot, device=DEVICE, dtype=case.dtype)
    stacks = [torch.stack(x) if x else empty for x in (depth[: case.s], depth[case.s :])]
    slots = None
    if case.slots == "stacked":
        slots = slot_table.stacked(*stacks)
    elif case.s:
        slots = getattr(slot_table, case.slots)(depth[: case.s], depth[case.s :])
    mask = make_mask(case)
    options: dict[str, Any] = dict(is_causal=case.causal, scale=case.d**-0.5, mask=mask)
    with poisoned():
        out, lse = decode.run(q, k, v, slots, **options, splits=case.splits)
        rows = None if mask is None else visible.distinct_rows(mask, case.g, case.queries)
        # Once more with what a graph's layers share.
        shared = None if mask is None or rows is None else visible.run(mask, *rows)
        again, lse_again = decode.run(q, k, v, slots, **options, seen=shared, splits=case.splits)
    assert torch.equal(out, again) and torch.equal(lse, lse_again), "two runs differ"
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous(), "layout"

    def reference(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        added = mask
        if mask is not None and mask.is_floating_point():
            # Eager has its mask in its own dtype, whose smallest number stands for float32's.
            added = mask.double().clamp(min=torch.finfo(compute).min).to(compute)
            added = added.masked_fill(mask == -math.inf, -math.inf)
        inputs = (x.to(compute) for x in (q, k, v, *stacks))
        return oracle(*inputs, **(options | dict(mask=added)))

    exact, exact_lse = reference(FP64)
    allowed = relative(reference(case.dtype)[0], exact) + BUDGET[case.dtype]
    return checking.verdict(
        {
            "out": (relative(out, exact), allowed),
            "lse": (relative(lse, exact_lse), BUDGET[FP32]),
        }
    )


class poisoned:
    """Fills what the kernels allocate with NaN: an element that is never written shows."""

    def __enter__(self) -> None:
        self.original: Any = Tensor.new_empty

        def new_empty(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            fresh: Tensor = self.original(x, *args, **kwargs)
            return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

        Tensor.new_empty = new_empty  # type: ignore[assignment, method-assign]

    def __exit__(self, *exception: object) -> None:
        Tensor.new_empty = self.original  # type: ignore[method-assign]


def check_nan() -> str:
    """NaN where the definition has it, and nowhere else."""
    for place, s in itertools.product(range(3), (0, 5)):
        torch.manual_seed(0)
        q, k, v = (tensor((2, h, t, 64), "head_major", BF16) for h, t in ((4, 2), (2, 99), (2, 99)))
        (q, k, v)[place][0, 0, 0, 0] = math.nan
        depth = torch.randn(2, s, 2, 2, 2, 64, device=DEVICE, dtype=BF16)
        options: dict[str, Any] = dict(is_causal=True, scale=0.125, mask=None)
        slots = slot_table.stacked(depth[0], depth[1]) if s else None
        out, lse = decode.run(q, k, v, slots, **options, splits=2)
        exact, exact_lse = oracle(*(x.double() for x in (q, k, v, *depth)), **options)
        assert torch.equal(out.isnan(), exact.isnan()), f"out, {'qkv'[place]}, S={s}"
        assert torch.equal(lse.isnan(), exact_lse.isnan()), f"lse, {'qkv'[place]}, S={s}"
    return "q, k, v"


def check_unread() -> str:
    """A cache's unused part may hold anything, and the result has the same bits."""
    q = tensor((3, 9, 1, 64), "token_major", BF16)
    k, v = (tensor((3, 3, 4096, 64), "head_major", BF16) for _ in range(2))
    mask = (torch.arange(4096, device=DEVICE) <= 1234)[None, None, None]
    options: dict[str, Any] = dict(is_causal=False, scale=0.125, mask=mask)
    out, lse = decode.run(q, k, v, None, **options)
    k[:, :, 1235:], v[:, :, 1235:] = math.nan, math.nan
    again, lse_again = decode.run(q, k, v, None, **options)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    return "NaN behind the position"


def check_long_offsets() -> str:
    """More than 2^31 elements of keys: the last batch entry equals the one computed alone."""
    b, hk, t, d = 17, 8, 262144, 64
    k, v = (torch.empty(b, hk, t, d, device=DEVICE, dtype=BF16).normal_() for _ in range(2))
    q = tensor((b, 2 * hk, 2, d), "token_major", BF16)
    depth = torch.randn(2, 5, b, hk, 2, d, device=DEVICE, dtype=BF16)
    options: dict[str, Any] = dict(is_causal=True, scale=d**-0.5, splits=7)
    out, lse = decode.run(q, k, v, slot_table.stacked(depth[0], depth[1]), **options)
    last = slot_table.stacked(depth[0, :, -1:], depth[1, :, -1:])
    alone, lse_alone = decode.run(q[-1:], k[-1:].clone(), v[-1:].clone(), last, **options)
    # Its own number of batches has its own tile: other roundings, and the same answer.
    for got, expected, most in ((out, alone, 2.0**-7), (lse, lse_alone, 2.0**-20)):
        error = relative(got[-1:], expected.double())
        assert error <= most, f"off by {error:.0e}"
    return f"{k.numel() / 2**31:.2f} * 2^31 elements"


def check_long_sequence() -> str:
    """A million keys, and a slice of a cache, token-major."""
    t, d = 10**6 + 3, 64
    cache = torch.randn(2, t + 5, 4, d, device=DEVICE, dtype=BF16)
    k, v = (x[None, :t].transpose(1, 2)[:, :2] for x in cache)
    q = tensor((1, 6, 1, d), "token_major", BF16)
    empty = torch.empty(0, 1, 2, 1, d, device=DEVICE, dtype=BF16)
    options: dict[str, Any] = dict(is_causal=True, scale=d**-0.5, mask=None)
    out, lse = decode.run(q, k, v, None, **options)
    exact, exact_lse = oracle(*(x.double() for x in (q, k, v, empty, empty)), **options)
    error = relative(out, exact)
    assert error <= 2 * BUDGET[BF16], f"out off by {error:.0e}"
    assert relative(lse, exact_lse) <= BUDGET[FP32], "lse"
    return f"{error:.0e}"


def check_cuda_graph() -> str:
    """A captured graph replays with new contents and a new position, without the host."""
    q = tensor((2, 9, 1, 64), "token_major", BF16)
    k, v = (tensor((2, 3, 2048, 64), "head_major", BF16) for _ in range(2))
    depth = [tensor((2, 3, 1, 64), "token_major", BF16) for _ in range(40)]
    position = torch.tensor(700, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        mask = (torch.arange(2048, device=DEVICE) <= position)[None, None, None]
        slots = slot_table.listed(depth[:20], depth[20:])
        return decode.run(q, k, v, slots, is_causal=False, scale=0.125, mask=mask)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for new in (5, 1024, 2047):
        position.fill_(new)
        for x in (q, k, v, *depth):
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in captured]
        direct = step()
        assert all(torch.equal(x, y) for x, y in zip(replayed, direct, strict=True)), f"at {new}"
    return "capture, three replays"


def check_compiled() -> str:
    """Inside torch.compile, as a triton_op, for three lengths in one graph."""
    torch._dynamo.reset()

    @torch.library.triton_op("moda_check::decode", mutates_args=())
    def call(
        q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots = slot_table.stacked(depth_k, depth_v)
        return decode.run(q, k, v, slots, is_causal=False, scale=0.125, mask=mask)

    compiled = torch.compile(lambda *x: call(*x), fullgraph=True)
    q = tensor((2, 6, 1, 64), "slice", BF16)
    depth = torch.randn(2, 9, 2, 2, 1, 64, device=DEVICE, dtype=BF16)
    for keys in (130, 257, 515):
        k, v = (tensor((2, 2, keys, 64), "head_major", BF16) for _ in range(2))
        mask = torch.rand(2, 1, 1, keys, device=DEVICE) > 0.3
        torch._dynamo.mark_dynamic(k, 2)
        torch._dynamo.mark_dynamic(v, 2)
        torch._dynamo.mark_dynamic(mask, 3)
        got, direct = (f(q, k, v, depth[0], depth[1], mask) for f in (compiled, call))
        for x, y in zip(got, direct, strict=True):  # other splits: other orders of sums
            error = relative(x, y.double())
            assert error < BUDGET[BF16], f"differs by {error:.1e} at {keys} keys"
    return "dynamic length"


def checks() -> list[checking.Check]:
    """All of them."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return [
        *((str(x), partial(check, x)) for x in cases()),
        ("NaN", check_nan),
        ("unread keys", check_unread),
        ("64-bit offsets", check_long_offsets),
        ("a million keys", check_long_sequence),
        ("CUDA graph", check_cuda_graph),
        ("torch.compile", check_compiled),
    ]


claims = partial(
    checking.claim,
    "decoding: out and lse against float64, every dtype, layout, mask, number of splits",
    checks,
)

if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
