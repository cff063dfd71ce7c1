"""Check every GPU kernel against a float64 oracle on this machine's GPU.

    python benchmarks/check_gpu.py [--only TEXT] [--jobs N]

One row a case: relative errors ||x - exact|| / ||exact|| of out, lse and every gradient, beside
the worst allowed one. Exits with 1 if a case fails. About a minute and a half, mostly compiling.
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
from torch import Tensor

from moda_compile.kernels import Lowering, split
from moda_compile.kernels import sequence as sequence_kernels

DEVICE = "cuda"
NAMES = ("out", "lse", "dq", "dk", "dv", "dK", "dV")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# A 16-bit result may be off by one rounding more than eager's: p and dz are rounded for the
# products. float32 gets what a few dozen reordered additions cost.
BUDGET = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 64 * 2.0**-24, FP64: 64 * 2.0**-53}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the operator, forward and backward."""

    sequence: str = ""  # empty: what `choose` says
    mode: str = "list"
    dtype: torch.dtype = BF16
    accumulator: torch.dtype = FP32
    b: int = 2
    t: int = 257
    past: int = 0  # keys in front of the queries' own, as with a KV cache
    hk: int = 2
    g: int = 8
    d: int = 64
    s: int = 17
    causal: bool = True
    layout: str = "token_major"
    mask: str = ""  # see `make_mask`; "+ gradient" behind it: learned

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        past = f"+{self.past}" if self.past else ""
        shape = f"B{self.b} T{self.t}{past} Hk{self.hk} G{self.g} d{self.d} S{self.s}"
        accumulator = str(self.accumulator).removeprefix("torch.") if self.mode == "list" else "-"
        seen = "" if self.causal else f" {self.mask or 'full'}"
        return f"{self.mode:7} {kind:8} acc {accumulator:8} {shape} {self.layout}{seen}"


def cases() -> Iterator[Case]:
    """Every backend, mode, dtype; head dims, groups, slot counts, layouts."""
    base = Case()
    for sequence, mode in itertools.product(
        ("cudnn", "flash", "efficient", "math"), ("list", "stacked")
    ):
        yield replace(base, sequence=sequence, mode=mode)
        yield replace(base, sequence=sequence, mode=mode, dtype=FP16, causal=False)
    for sequence in ("cudnn", "flash", "efficient"):
        for layout in ("slice", "head_major", "odd_offset", "dim_major"):
            yield replace(base, sequence=sequence, layout=layout)
        yield replace(base, sequence=sequence, d=76, g=1, hk=3, s=5)
        yield replace(base, sequence=sequence, d=128, g=2, t=130)
        yield replace(base, sequence=sequence, s=0)
        yield replace(base, sequence=sequence, s=0, mode="stacked", layout="head_major")
    yield replace(base, accumulator=BF16)
    for mode in ("list", "stacked"):
        for s in (1, 16, 64):
            yield replace(base, mode=mode, s=s)
        yield replace(base, mode=mode, t=1)
        yield replace(base, mode=mode, t=2)
        yield replace(base, mode=mode, dtype=FP32)
        yield replace(base, mode=mode, dtype=FP32, d=128, g=2, t=65)
        yield replace(base, mode=mode, dtype=FP64, accumulator=FP64, t=33)
        yield replace(base, mode=mode, layout="mixed", s=35)
        yield replace(base, mode=mode, d=257, g=2, t=33, s=5)
    for d, g in ((1, 1), (5, 2), (16, 3), (40, 2), (64, 1), (64, 32), (80, 2), (192, 1), (256, 8)):
        yield replace(base, d=d, g=g, t=130)
    yield replace(base, mode="stacked", d=256, g=32, hk=1, t=67, s=5)
    for sequence in ("cudnn", "flash", "efficient", "math"):  # more keys than queries
        yield replace(base, sequence=sequence, t=66, past=131, causal=False)
    for t, past in ((1, 1), (1, 1030), (5, 130), (130, 67)):
        for mode in ("list", "stacked"):
            yield replace(base, mode=mode, t=t, past=past)
        yield replace(base, dtype=FP32, t=t, past=past)
        yield replace(base, mask="bool", causal=False, t=t, past=past)
        yield replace(base, mask="alibi + gradient", causal=False, g=2, t=t, past=past)
    fused = replace(base, sequence="fused")
    for dtype in (BF16, FP16, FP32):
        yield replace(fused, dtype=dtype)
        yield replace(fused, dtype=dtype, mode="stacked", mask="bool", causal=False, g=2)
    for d, g in ((16, 3), (64, 1), (76, 1), (80, 2), (128, 2), (192, 1), (256, 8), (64, 32)):
        yield replace(fused, d=d, g=g, t=130)
    for layout in ("slice", "head_major", "odd_offset", "dim_major", "mixed"):
        yield replace(fused, layout=layout)
    for t, past in ((1, 1), (5, 130), (130, 67), (1031, 0)):
        yield replace(fused, t=t, past=past, accumulator=BF16)
    yield replace(fused, s=0)
    # Masks; the first token of every batch entry sees no key at all, but for "alibi" and "padding".
    base = replace(base, causal=False, g=2, s=5)
    learned = "alibi + gradient"
    for mask in ("bool", "padding", "-inf", "smallest", "alibi", learned):
        for sequence in ("", "math"):
            yield replace(base, sequence=sequence, mask=mask)
        yield replace(base, mask=mask, mode="stacked")
        yield replace(base, mask=mask, s=0)
        yield replace(base, mask=mask, dtype=FP32)
    for t in (1, 2, 16, 130, 1031):
        yield replace(base, mask="bool", t=t)
        yield replace(base, mask=learned, t=t)
    for mask in ("bool", learned):
        for dtype in (FP16, FP64):
            yield replace(base, mask=mask, dtype=dtype, accumulator=dtype)
        yield replace(base, mask=mask, d=76, g=1, hk=3)
        yield replace(base, mask=mask, d=256)
        yield replace(base, mask=mask, layout="mixed")
        yield replace(base, mask=mask, mode="stacked", s=0)
    for layout in ("head_major", "odd_offset", "dim_major"):
        yield replace(base, mask="smallest", layout=layout, dtype=FP16)


def tensor(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """A random tensor [B, H, T, d] that lies in memory as `layout` says."""
    b, h, t, d = shape
    draw = torch.randn
    if layout == "head_major":
        return draw(b, h, t, d, device=DEVICE).to(dtype)
    if layout == "slice":
        return draw(b, t, 3, h, d, device=DEVICE).to(dtype)[:, :, 1].transpose(1, 2)
    if layout == "odd_offset":
        flat = draw(b * t * h * d + 1, device=DEVICE).to(dtype)
        return flat[1:].view(b, t, h, d).transpose(1, 2)
    if layout == "dim_major":
        return draw(b, h, d, t, device=DEVICE).to(dtype).mT
    return draw(b, t, h, d, device=DEVICE).to(dtype).transpose(1, 2)


def make_mask(case: Case) -> Tensor | None:
    """The case's mask, in the dtype in which models have it."""
    t, heads = case.t + case.past, case.hk * case.g
    row = torch.arange(case.past, t, device=DEVICE)[:, None]
    column = torch.arange(t, device=DEVICE)[None, :]
    batch = torch.arange(case.b, device=DEVICE)[:, None, None, None]
    visible = (column <= row) & (column > batch)
    if case.mask == "bool":
        return visible
    if case.mask == "padding":
        return column.reshape(1, 1, 1, t) < (t - 3 * batch).clamp(min=1)
    if case.mask == "-inf":
        return torch.zeros(visible.shape, device=DEVICE).masked_fill(~visible, -math.inf)
    if case.mask == "smallest":  # float32's, also beside 16-bit inputs: transformers under autocast
        smallest = torch.finfo(FP32).min
        return torch.zeros(visible.shape, device=DEVICE).masked_fill(~visible, smallest)
    if case.mask.startswith("alibi"):
        slopes = torch.linspace(0.01, 0.5, heads, device=DEVICE)[:, None, None]
        bias = (slopes * (column - row).abs().neg()).to(case.dtype)[None]
        return bias.requires_grad_(case.mask.endswith("gradient"))
    return None


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: one softmax over the sequence's and the slots' scores (section 3)."""
    group, t, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    depth_k, depth_v = depth_k.repeat_interleave(group, 2), depth_v.repeat_interleave(group, 2)
    z_seq = q @ k.mT * scale
    if causal:
        future = torch.ones(t, keys, dtype=torch.bool, device=q.device).triu(1 + keys - t)
        z_seq = z_seq.masked_fill(future, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        z_seq = z_seq.masked_fill(~mask, -math.inf)
    elif mask is not None:
        z_seq = z_seq + mask
    z = torch.cat([z_seq, torch.einsum("bhtd,sbhtd->bhts", q, depth_k) * scale], -1)
    dead = (z == -math.inf).all(-1, keepdim=True)
    z = z.masked_fill(dead, 0.0)
    p = z.softmax(-1).masked_fill(dead, 0.0)
    out = p[..., :keys] @ v + torch.einsum("bhts,sbhtd->bhtd", p[..., keys:], depth_v)
    return out, z.logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf)


def relative(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||, over what is no masked-out row's lse: those must agree."""
    far = exact < -1e30
    if not torch.equal(x.double() < -1e30, far) or not torch.equal(
        x == -math.inf, exact.isneginf()
    ):
        return math.nan
    if far.all():
        return 0.0
    return ((x.double() - exact)[~far].norm() / exact[~far].norm().clamp(min=1e-30)).item()


def check(case: Case) -> str:
    """The row of a case; raises if anything is too far off."""
    torch.manual_seed(0)
    hq, scale = case.hk * case.g, case.d**-0.5
    layouts: Iterator[str] = itertools.repeat(case.layout)
    if case.layout == "mixed":
        layouts = itertools.cycle(("token_major", "slice", "head_major", "odd_offset", "dim_major"))
    kv = (case.b, case.hk, case.t, case.d)
    q = tensor((case.b, hq, case.t, case.d), case.layout, case.dtype)
    sequence = (case.b, case.hk, case.past + case.t, case.d)
    k, v = (tensor(sequence, case.layout, case.dtype) for _ in range(2))
    depth_k, depth_v = (
        [tensor(kv, next(layouts), case.dtype) for _ in range(case.s)] for _ in range(2)
    )
    empty = torch.empty(0, *kv, device=DEVICE, dtype=case.dtype)
    stacks = [torch.stack(x) if x else empty for x in (depth_k, depth_v)]
    if case.layout == "mixed":  # a stack whose slots are the innermost but one dimension
        stacks = [x.permute(1, 3, 2, 0, 4).contiguous().permute(3, 0, 2, 1, 4) for x in stacks]
    grad = tensor((case.b, hq, case.t, case.d), "head_major", case.dtype)
    mask = make_mask(case)
    learned = mask is not None and mask.requires_grad
    lowering = Lowering("split", case.sequence, "forced") if case.sequence else None
    if case.sequence == "fused":
        lowering = Lowering("fused", "triton", "forced")
    options: dict[str, Any] = dict(
        is_causal=case.causal,
        scale=scale,
        lowering=lowering,
        mask=None if mask is None else mask.detach(),
    )
    if case.mode == "list":
        shape = (case.s + 2, 2, case.b, case.t, case.hk, case.d)
        acc = torch.randn(shape, device=DEVICE).to(case.accumulator).transpose(3, 4)
        before = acc.clone()
        out, lse = split.forward(q, k, v, depth_k, depth_v, **options)
        lists = (grad, q, k, v, depth_k, depth_v, out, lse, acc)
        dq, dk, dv, dmask = split.backward(*lists, **options, mask_gradient=learned)
        if not torch.equal(acc[case.s :], before[case.s :]):
            raise AssertionError("rows past the last slot changed")
        got = [out, lse, dq, dk, dv, acc[: case.s, 0], acc[: case.s, 1]]
        start = before[: case.s].double()
    else:
        args = (q, k, v, *stacks)
        out, lse = split.forward_stacked(*args, **options)
        saved = (grad, *args, out, lse)
        *made, dmask = split.backward_stacked(*saved, **options, mask_gradient=learned)
        got = [out, lse, *made]
        start = torch.zeros(case.s, 2, *kv, device=DEVICE, dtype=FP64)

    def reference(compute: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(compute).requires_grad_() for x in (q, k, v, *stacks)]
        added = mask
        if mask is not None and mask.is_floating_point():
            # Eager has its mask in its own dtype, whose smallest number stands for float32's.
            added = mask.detach().double().clamp(min=torch.finfo(compute).min).to(compute)
            added = added.masked_fill(mask == -math.inf, -math.inf).requires_grad_(learned)
        exact, exact_lse = oracle(*leaves, causal=case.causal, scale=scale, mask=added)
        wanted = leaves if added is None or not learned else [*leaves, added]
        grads = list(torch.autograd.grad(exact, wanted, grad.to(compute)))
        grads[3:5] = [grads[3].double() + start[:, 0], grads[4].double() + start[:, 1]]
        return [exact.detach(), exact_lse.detach(), *grads]

    if dmask is not None:
        got.append(dmask)
    exact, eager = reference(FP64), reference(case.dtype)
    names = (*NAMES, "dM") if learned else NAMES
    errors = {
        name: (relative(x, y), relative(z, y) + BUDGET[case.dtype])
        for name, x, y, z in zip(names, got, exact, eager, strict=True)
    }
    # It is never in 16 bits.
    errors["lse"] = (errors["lse"][0], BUDGET[FP64 if case.dtype == FP64 else FP32])
    return checking.verdict(errors)


def check_long_offsets() -> str:
    """Slots more than 2^31 elements apart: the stacked form equals the table form, in gradients but
    for the order of their sums.
    """
    t, h, d, s = 65536, 8, 64, 72
    big = torch.randn(s, 1, t, h, d, device=DEVICE, dtype=BF16).transpose(2, 3)
    q, k, v, grad = (tensor((1, h, t, d), "token_major", BF16) for _ in range(4))
    options: dict[str, Any] = dict(is_causal=True, scale=d**-0.5)
    slots = list(big.unbind(0))
    out, lse = split.forward_stacked(q, k, v, big, big, **options)
    assert torch.equal(out, split.forward(q, k, v, slots, slots, **options)[0]), "out differs"
    dk, dv = split.backward_stacked(grad, q, k, v, big, big, out, lse, **options)[3:5]
    acc = torch.zeros(s, 2, 1, t, h, d, device=DEVICE, dtype=BF16).transpose(3, 4)
    split.backward(grad, q, k, v, slots, slots, out, lse, acc, **options)
    for side, other in ((acc[:, 0], dk), (acc[:, 1], dv)):
        for x, y in zip(side, other, strict=True):
            apart = relative(x, y)
            assert apart <= BUDGET[BF16], f"a slot's gradients differ by {apart:.1e}"
    return f"{big.numel() / 2**31:.2f} * 2^31 elements"


def check_repeatable() -> str:
    """The depth gradients have the same bits every time."""
    q, k, v, grad = (tensor((1, 8, 515, 64), "token_major", BF16) for _ in range(4))
    slots = [tensor((1, 8, 515, 64), "slice", BF16) for _ in range(20)]
    options: dict[str, Any] = dict(is_causal=True, scale=0.125)
    out, lse = split.forward(q, k, v, slots, slots, **options)
    runs = []
    for _ in range(5):
        acc = torch.zeros(20, 2, 1, 8, 515, 64, device=DEVICE)
        split.backward(grad, q, k, v, slots, slots, out, lse, acc, **options)
        runs.append(acc)
    assert all(torch.equal(x, runs[0]) for x in runs), "runs differ"
    return "5 runs"


def check_cuda_graph() -> str:
    """The table is written on the device: a captured graph replays with new contents."""
    q, k, v, grad = (tensor((1, 8, 256, 64), "token_major", BF16) for _ in range(4))
    slots = [tensor((1, 8, 256, 64), "token_major", BF16) for _ in range(20)]
    acc = torch.zeros(20, 2, 1, 8, 256, 64, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = dict(is_causal=True, scale=0.125)
        out, lse = split.forward(q, k, v, slots, slots, **options)
        dq, *_ = split.backward(grad, q, k, v, slots, slots, out, lse, acc, **options)
        return out, dq

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for x in (q, *slots):
        x.copy_(torch.randn_like(x))
    acc.zero_()
    graph.replay()
    torch.cuda.synchronize()
    from_graph = [x.clone() for x in (*captured, acc)]
    acc.zero_()
    direct = (*step(), acc)
    for name, x, y in zip(("out", "dq", "slot gradients"), from_graph, direct, strict=True):
        # The sequence part's dq may be summed in another order: a few roundings, no more.
        error = relative(x, y.double())
        assert error < 2.0**-8, f"{name} differs by {error:.1e}"
    return "capture, replay"


def check_compiled() -> str:
    """Inside torch.compile, as a triton_op: Inductor runs the same kernels."""

    @torch.library.triton_op("moda_check::forward", mutates_args=())
    def forward(
        q: Tensor, k: Tensor, v: Tensor, depth_k: Tensor, depth_v: Tensor
    ) -> tuple[Tensor, Tensor]:
        return split.forward_stacked(q, k, v, depth_k, depth_v, is_causal=True, scale=0.125)

    @torch.library.triton_op("moda_check::backward", mutates_args=())
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        depth_k: Tensor,
        depth_v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return split.backward_stacked(
            grad, q, k, v, depth_k, depth_v, out, lse, is_causal=True, scale=0.125
        )[:5]

    def both(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        out, lse = forward(*inputs)
        return (out, lse, *backward(grad, *inputs, out, lse))

    q, grad = (tensor((2, 8, 130, 64), "slice", BF16) for _ in range(2))
    k, v = (tensor((2, 4, 130, 64), "slice", BF16) for _ in range(2))
    depth = torch.randn(2, 9, 2, 130, 4, 64, device=DEVICE, dtype=BF16).transpose(3, 4)
    inputs = (q, k, v, depth[0], depth[1])
    compiled = torch.compile(both, fullgraph=True, dynamic=False)(grad, *inputs)
    for name, x, y in zip(NAMES, compiled, both(grad, *inputs), strict=True):
        error = relative(x, y.double())
        assert error < 2.0**-8, f"{name} differs by {error:.1e}"
    return "forward, backward"


def check_after_plain() -> str:
    """A plain model's attention of the same strides, run first, must not change ours."""
    b, heads, t, d, scale = 8, 4, 128, 32, 32**-0.5
    worst = 0.0
    for layout in ("head_major", "token_major"):
        q, k, v = (tensor((b, heads, t, d), layout, BF16) for _ in range(3))
        plain = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                plain[0], plain[1], plain[2], is_causal=True
            )
        out.backward(torch.randn_like(out))
        grad = tensor((b, heads, t, d), "token_major", BF16)
        out, lse = sequence_kernels.forward("cudnn", q, k, v, is_causal=True, scale=scale)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as our kernels return it
        ours, exact = (
            sequence_kernels.backward(name, grad, q, k, v, out, lse, is_causal=True, scale=scale)[
                :3
            ]
            for name in ("cudnn", "math")
        )
        worst = max(worst, *(relative(x, y.double()) for x, y in zip(ours, exact, strict=True)))
    assert worst < 2.0**-7, f"differs by {worst:.1e}"
    return f"{worst:.0e}"


def checks() -> list[checking.Check]:
    """All of them."""
    return [
        *((f"{x.sequence or 'chosen':9} {x}", partial(check, x)) for x in cases()),
        ("repeatable", check_repeatable),
        ("CUDA graph", check_cuda_graph),
        ("64-bit offsets", check_long_offsets),
        ("torch.compile", check_compiled),
        ("after plain attention", check_after_plain),
    ]


claims = partial(
    checking.claim,
    "op: forward and all gradients against float64, every dtype, layout, backend, mask",
    checks,
)

if __name__ == "__main__":
    checking.main(__doc__, checks, claims)
