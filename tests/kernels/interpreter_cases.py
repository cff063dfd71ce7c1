"""Run the Triton kernels in Triton's interpreter and print their errors, one JSON line a case.

A script, not a test: TRITON_INTERPRET must be set before Triton is imported, and pytest's own
process has it imported (and needs it uninterpreted) for the tracing tests. Run by
test_interpreter.py; by hand: TRITON_INTERPRET=1 python tests/kernels/interpreter_cases.py
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from moda_compile.kernels import Lowering, configs, slot_table, split  # noqa: E402
from moda_compile.kernels import sequence as sequence_kernels  # noqa: E402
from tests.kernels.script import report  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = ("out", "lse", "dq", "dk", "dv", "d_depth_k", "d_depth_v")


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
    """The definition (arXiv 2603.15619, section 3): one softmax over the concatenated scores.

    q [B, Hq, Tq, d]; k, v [B, Hk, Tk, d]; depth_k, depth_v [S, B, Hk, Tq, d]. In the dtype of q.
    """
    group, t, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    depth_k, depth_v = depth_k.repeat_interleave(group, 2), depth_v.repeat_interleave(group, 2)
    z_seq = torch.einsum("bhtd,bhud->bhtu", q, k) * scale
    if causal:
        z_seq = z_seq.masked_fill(~torch.ones(t, keys, dtype=torch.bool).tril(keys - t), -math.inf)
    if mask is not None:
        z_seq = z_seq.masked_fill(~mask, -math.inf)
    z_depth = torch.einsum("bhtd,sbhtd->bhts", q, depth_k) * scale
    z = torch.cat([z_seq, z_depth], -1)
    p = z.softmax(-1)
    out = torch.einsum("bhtu,bhud->bhtd", p[..., :keys], v)
    out = out + torch.einsum("bhts,sbhtd->bhtd", p[..., keys:], depth_v)
    return out, z.logsumexp(-1)


def relative(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||; NaN stays NaN, and nothing of nothing is 0."""
    if reference.numel() == 0:
        return 0.0
    return ((x.double() - reference).norm() / reference.norm()).item()


def strided(shape: Sequence[int], layout: str, dtype: torch.dtype, draw: Any) -> Tensor:
    """A random tensor [B, H, T, d] that lies in memory as `layout` says."""
    b, h, t, d = shape
    if layout == "head_major":
        return draw(b, h, t, d).to(dtype)
    if layout == "token_major":
        return draw(b, t, h, d).to(dtype).transpose(1, 2)
    if layout == "slice":  # of a fused projection
        return draw(b, t, 3, h, d).to(dtype)[:, :, 1].transpose(1, 2)
    if layout == "odd_offset":  # rows that start on no boundary wider than an element
        return draw(b * t * h * d + 1).to(dtype)[1:].view(b, t, h, d).transpose(1, 2)
    if layout == "dim_major":  # last stride not 1
        return draw(b, h, d, t).to(dtype).mT
    raise ValueError(layout)


LAYOUTS = ("token_major", "slice", "head_major", "odd_offset", "dim_major")


def cases() -> Iterator[dict[str, Any]]:
    """Every value of every parameter occurs with several of the others; sizes are odd and small."""
    base = dict(b=1, hk=2, t=5, d=16, g=2, s=5, causal=True, layout="token_major", mixed=False)
    grid = itertools.product(("list", "stacked"), DTYPES)
    for mode, dtype in grid:
        accumulators = ("fp32", dtype) if mode == "list" and dtype != "fp32" else ("fp32",)
        for acc in accumulators:
            yield base | dict(mode=mode, dtype=dtype, acc=acc)
    for mode in ("list", "stacked"):
        low = dict(mode=mode, dtype="bf16", acc="fp32")
        for d in (1, 5, 40, 64, 76, 80, 128):
            yield base | low | dict(d=d, t=3)
        for g in (1, 3, 8, 20):
            yield base | low | dict(g=g, b=2, hk=1)
        for s in (0, 1, 16, 17):
            yield base | low | dict(s=s, dtype="fp16")
        yield base | low | dict(t=1)
        yield base | low | dict(causal=False, b=2)
        for queries, keys in ((1, 6), (3, 7), (18, 23)):  # with a KV cache
            yield base | low | dict(t=queries, keys=keys)
        for layout in LAYOUTS[1:]:
            yield base | low | dict(layout=layout, d=24, b=2, t=3)
    # Slots that differ in their strides: the table's per-slot strides, several fills.
    for s, dtype in ((1, "fp32"), (5, "bf16"), (35, "fp16")):
        yield base | dict(mode="list", dtype=dtype, acc="fp32", s=s, mixed=True, t=3, b=2)
    yield base | dict(mode="list", dtype="bf16", acc="fp32", s=35, t=3)
    # A mask with rows that see no key, and the depth part alone, given the sequence part.
    masked = dict(mask=True, causal=False, b=2, acc="fp32")
    for dtype in DTYPES:
        yield base | masked | dict(mode="list", dtype=dtype)
        yield base | masked | dict(mode="stacked", dtype=dtype)
        yield base | masked | dict(mode="merge", dtype=dtype)
        yield base | masked | dict(mode="merge", dtype=dtype, layout="dim_major", s=17, g=3, b=1)
    # Scores far below and above zero: nothing may overflow, in live or in padded slots.
    for mode in ("list", "stacked"):
        yield base | dict(mode=mode, dtype="fp32", acc="fp32", shift=40.0)
        yield base | dict(mode=mode, dtype="fp32", acc="fp32", shift=-40.0)
    # The matrix kernels where the vector kernels are chosen.
    matrix = base | dict(products="matrix", t=3)
    for mode, dtype in itertools.product(("list", "stacked"), DTYPES):
        accumulators = ("fp32", dtype) if mode == "list" and dtype != "fp32" else ("fp32",)
        for acc in accumulators:
            yield matrix | dict(mode=mode, dtype=dtype, acc=acc, s=17 if acc == "fp32" else 5)
    for d, g in ((5, 1), (76, 1), (128, 3)):
        yield matrix | dict(mode="list", dtype="bf16", acc="fp32", d=d, g=g, s=1, b=2)
        yield matrix | dict(mode="stacked", dtype="fp16", acc="fp32", d=d, g=g)
    for s, dtype in ((5, "bf16"), (17, "fp32")):
        yield matrix | dict(mode="list", dtype=dtype, acc="fp32", s=s, mixed=True)
    yield matrix | masked | dict(mode="merge", dtype="fp32", layout="dim_major", b=1)
    yield matrix | dict(mode="list", dtype="fp32", acc="fp32", shift=40.0)
    # The vector kernels for every group that they are for, at head dims that are no power of two,
    # with tiles smaller and larger than what there is, loading ahead or not: (rows, slots, stages).
    vector = base | dict(products="vector", t=3)
    tiles = itertools.cycle((None, (4, 2, 2), (16, 4, 2), (2, 1, 1)))
    sizes = itertools.cycle((76, 64, 70, 96, 80))
    kinds = itertools.cycle(itertools.product(("list", "stacked", "merge", "list"), DTYPES))
    for g, s in itertools.product((1, 2, 3, 4, 8), (1, 5, 17)):
        mode, dtype = next(kinds)
        part = dict(mode=mode, dtype=dtype, acc=dtype if g % 2 else "fp32", mixed=s == 5)
        part |= dict(causal=mode != "merge", b=2 if s == 1 and g < 8 else 1)
        yield vector | part | dict(g=g, s=s, d=next(sizes), tile=next(tiles))
    yield vector | dict(mode="list", dtype="bf16", acc="bf16", d=256, hk=3, s=2, tile=(2, 4, 2))
    # One kernel for sequence and slots.
    fused = base | dict(lowering="fused")
    for mode, dtype in itertools.product(("list", "stacked"), DTYPES):
        yield fused | dict(mode=mode, dtype=dtype, acc="fp32", t=37 if mode == "list" else 5)
        yield fused | masked | dict(mode=mode, dtype=dtype, t=9)
    yield fused | dict(mode="list", dtype="fp32", acc="fp32", d=1, g=1)
    for d, g, t in ((5, 1, 70), (76, 3, 9), (128, 1, 33), (256, 20, 3), (40, 8, 9)):
        yield fused | dict(mode="list", dtype="bf16", acc="bf16", d=d, g=g, t=t, s=2)
    for queries, keys in ((1, 6), (3, 70), (37, 50)):
        yield fused | dict(mode="list", dtype="fp16", acc="fp32", t=queries, keys=keys)
    for layout in LAYOUTS[1:]:
        yield fused | dict(mode="list", dtype="bf16", acc="fp32", layout=layout, d=24, b=2, t=3)
    yield fused | dict(mode="list", dtype="bf16", acc="fp32", s=0, t=18)
    yield fused | dict(mode="stacked", dtype="fp32", acc="fp32", s=17, causal=False)
    yield fused | dict(mode="list", dtype="fp16", acc="fp16", s=5, mixed=True, hk=3)
    for shift in (40.0, -40.0):
        yield fused | dict(mode="list", dtype="fp32", acc="fp32", shift=shift)
    yield fused | dict(mode="gather", dtype="bf16", acc="bf16", readers=(2, 1), t=3, s=2)
    # Slots' gradients from all their readers at once; acc is the dtype that they come in.
    gathered = base | dict(mode="gather", t=3, s=2)
    for g, dtype in itertools.product((1, 2, 4), DTYPES):
        yield gathered | dict(g=g, dtype=dtype, acc=dtype, readers=(3, 2), d=next(sizes))
    for tile in ((4, 1, 2), (16, 2, 2), (2, 4, 2)):
        yield gathered | dict(dtype="bf16", acc="fp32", readers=(5, 4), b=2, tile=tile)
    for s, readers in ((1, (1,)), (1, (4,)), (3, (2, 2, 1)), (2, (1, 0))):
        yield gathered | dict(dtype="fp16", acc="fp16", s=s, readers=readers, hk=3, mixed=True)
    for layout in LAYOUTS[1:]:
        yield gathered | dict(dtype="bf16", acc="bf16", readers=(2, 1), layout=layout, d=24)
    yield gathered | dict(dtype="fp32", acc="fp32", readers=(2, 1), d=1, t=1)
    yield gathered | dict(dtype="fp16", acc="fp16", readers=(2, 2), d=256, g=3)
    for g, starts, acc in ((1, (0, 1), "bf16"), (2, (1, 2), "fp32"), (3, (0, 1, 2, 3), "bf16")):
        yield gathered | dict(dtype="bf16", acc=acc, g=g, readers=(3, 2), starts=starts, mixed=True)
    yield gathered | dict(dtype="fp16", acc="fp16", s=3, readers=(3, 2, 1), starts=(0, 5))
    # The first slots' sums begun in one launch and gone on with in another.
    part = dict(s=4, readers=(4, 3, 2, 1), begun=2, starts=(1, 4))
    own = ((1, "fp32", 76), (1, "bf16", 64), (2, "fp16", 96), (3, "bf16", 24), (4, "fp32", 5))
    for g, dtype, d in (*own, (4, "fp16", 80)):
        yield gathered | part | dict(g=g, dtype=dtype, acc=dtype, d=d, mixed=g == 3, hk=1)
    part = dict(dtype="fp16", acc="fp32", begun=1, hk=3)
    yield gathered | part | dict(s=2, readers=(3, 1), d=5, b=2)
    yield gathered | part | dict(s=3, readers=(3, 2, 2), d=128, begun=2)
    yield gathered | part | dict(s=4, readers=(4, 3, 2, 2), d=24, g=1)
    for tile in ((4, 1, 2), (16, 4, 2)):
        part = dict(s=4, readers=(5, 4, 3, 2), begun=2, turned=True, layout="odd_offset")
        yield gathered | part | dict(dtype="fp32", acc="fp32", d=24, tile=tile)
    # The kernels write the slots' addresses themselves; of 9 slots in two groups of rows.
    named = dict(named=True, dtype="bf16", acc="bf16")
    for g, readers, t in ((1, (10, 9), 3), (2, (1, 1), 5), (4, (3, 2), 3)):
        yield gathered | named | dict(g=g, readers=readers, t=t)
    yield gathered | named | dict(s=4, readers=(11, 10, 9, 8), begun=2)
    yield base | named | dict(mode="list", s=9, g=2)
    # Enough slots for the matrix kernels to read them, although the group is small.
    for mode in ("list", "stacked"):
        yield base | dict(mode=mode, dtype="bf16", acc="bf16", s=33, g=4, t=3)
    # What the kernel is not for, by PyTorch operations, and the matrix kernel's delta.
    yield gathered | dict(dtype="bf16", acc="bf16", readers=(2, 1), g=20)
    yield gathered | dict(dtype="bf16", acc="bf16", readers=(2, 1), g=20, begun=1)
    yield gathered | dict(dtype="bf16", acc="bf16", readers=(2, 1), products="matrix")
    yield vector | dict(mode="stacked", dtype="fp32", acc="fp32", d=64, t=23, tile=(8, 2, 1))
    yield vector | dict(mode="stacked", dtype="fp32", acc="fp32", d=64, t=23, tile=(8, 1, 4))
    yield vector | dict(mode="list", dtype="bf16", acc="bf16", d=64, t=23, g=2, tile=(8, 2, 3))
    yield gathered | dict(dtype="bf16", acc="bf16", readers=(5, 4), g=2, tile=(8, 1, 3))


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Errors of the kernels and of eager low-precision PyTorch against float64, by name."""
    chosen: dict[str, Any] = {}
    if case.get("products"):
        chosen["products"] = mock.Mock(return_value=case["products"])
    if case.get("tile"):
        rows, slots, stages = case["tile"]
        tile = configs.Tile(rows=rows, slots=slots, warps=1, stages=stages)
        chosen |= dict.fromkeys(
            ("vector_forward_tile", "vector_backward_tile", "vector_query_tile", "gather_tile"),
            mock.Mock(return_value=tile),
        )
    measure = gather_errors if case["mode"] == "gather" else errors
    with contextlib.ExitStack() as stack:
        if chosen:
            stack.enter_context(mock.patch.multiple(configs, **chosen))
        if case.get("named"):
            stack.enter_context(mock.patch.object(slot_table, "table", slot_table.named))
        return measure(case)


def errors(case: dict[str, Any]) -> dict[str, Any]:
    """As `run`, by the kernels that `configs` chooses."""
    generator = torch.Generator().manual_seed(0)
    dtype, acc_dtype = DTYPES[case["dtype"]], DTYPES[case["acc"]]
    b, hk, t, d, s = (case[x] for x in ("b", "hk", "t", "d", "s"))
    hq, scale, causal = hk * case["g"], d**-0.5, case["causal"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layout = case["layout"]
    q = strided((b, hq, t, d), layout, dtype, draw)
    sequence = (b, hk, case.get("keys", t), d)
    k, v = (strided(sequence, layout, dtype, draw) for _ in range(2))
    if "shift" in case:  # moves every score of a query by about the same amount
        q = q + 8.0
        k = k + case["shift"] / (8.0 * d * scale)
    layouts = itertools.cycle(LAYOUTS) if case["mixed"] else itertools.repeat(layout)
    slots = [strided((b, hk, t, d), next(layouts), dtype, draw) for _ in range(2 * s)]
    if "shift" in case:
        slots = [x + case["shift"] / (8.0 * d * scale) for x in slots[:s]] + slots[s:]
    depth_k, depth_v = slots[:s], slots[s:]
    mask = None
    if case.get("mask"):  # the first two rows see nothing, the others what is not behind them
        mask = torch.ones(t, t, dtype=torch.bool).tril(-2)
    lowering = chosen_lowering(case)
    options: dict[str, Any] = dict(is_causal=causal, scale=scale, mask=mask, lowering=lowering)
    empty = torch.empty(0, b, hk, t, d, dtype=dtype)
    stack_k = torch.stack(depth_k) if s else empty
    stack_v = torch.stack(depth_v) if s else empty
    grad = strided((b, hq, t, d), "head_major", dtype, draw)

    if case["mode"] != "stacked":
        # Two rows more than slots, and other contents than zero: += is told from =, and the rows
        # past the last slot must keep their bits.
        before = draw(s + 2, 2, b, t, hk, d).to(acc_dtype).transpose(3, 4)
        if layout == "dim_major":
            before = draw(s + 2, 2, b, hk, d, t).to(acc_dtype).mT
        acc = before.clone(memory_format=torch.preserve_format)
        if case["mode"] == "list":
            out, lse = split.forward(q, k, v, depth_k, depth_v, **options)
            saved = (grad, q, k, v, depth_k, depth_v, out, lse, acc)
            dq, dk, dv, _ = split.backward(*saved, **options)
        else:
            options.pop("lowering")
            own = sequence_kernels.forward("math", q, k, v, **options)
            out, lse = split.merge(*own, q, depth_k, depth_v, scale=scale)
            merged = (grad, *own, q, depth_k, depth_v, out, lse, acc)
            dq, dk, dv = through_the_lse(
                q, k, v, mask, scale, *split.merge_backward(*merged, scale=scale)
            )
        untouched = torch.equal(acc[s:], before[s:])
        gains = (acc[:s].double(), before[:s].double())
    else:
        args = (q, k, v, stack_k, stack_v)
        out, lse = split.forward_stacked(*args, **options)
        dq, dk, dv, d_depth_k, d_depth_v, _ = split.backward_stacked(
            grad, *args, out, lse, **options
        )
        untouched = True

    def reference(compute: torch.dtype) -> list[Tensor]:
        leaves = [x.to(compute).requires_grad_() for x in (q, k, v, stack_k, stack_v)]
        exact, exact_lse = oracle(*leaves, causal=causal, scale=scale, mask=mask)
        grads = torch.autograd.grad(exact, leaves, grad.to(compute))
        return [exact.detach(), exact_lse.detach(), *grads]

    exact, eager = reference(torch.float64), reference(dtype)
    if case["mode"] != "stacked":
        # Compare the sums: what a float32 or 16-bit accumulator can hold of before + gradient.
        after, start = gains
        got = [out, lse, dq, dk, dv, after[:, 0], after[:, 1]]
        exact[5], exact[6] = exact[5] + start[:, 0], exact[6] + start[:, 1]
        eager[5], eager[6] = eager[5].double() + start[:, 0], eager[6].double() + start[:, 1]
    else:
        got = [out, lse, dq, dk, dv, d_depth_k, d_depth_v]
    token_major = all(x.transpose(1, 2).is_contiguous() for x in (out, dq, dk, dv))
    return {
        "error": {n: relative(x, y) for n, x, y in zip(NAMES, got, exact, strict=True)},
        "eager": {n: relative(x, y) for n, x, y in zip(NAMES, eager, exact, strict=True)},
        "untouched": untouched,
        "token_major": token_major,
        "dtypes": [str(x.dtype) for x in (out, lse, dq, dk, dv)],
    }


def chosen_lowering(case: dict[str, Any]) -> Lowering | None:
    """Split, but where the case says so; with a KV cache what the library chooses."""
    if case.get("lowering") == "fused":
        return Lowering("fused", "triton", "named by the test")
    return None if "keys" in case else Lowering("split", "math", "named by the test")


def gather_errors(case: dict[str, Any]) -> dict[str, Any]:
    """As `errors`, of several layers that read the same slots; dq, dk, dv of the first of them."""
    generator = torch.Generator().manual_seed(1)
    dtype, count = DTYPES[case["dtype"]], case["readers"]
    b, hk, t, d, s = (case[x] for x in ("b", "hk", "t", "d", "s"))
    hq, scale = hk * case["g"], d**-0.5

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layouts = itertools.cycle(LAYOUTS) if case["mixed"] else itertools.repeat(case["layout"])

    def tensor(heads: int) -> Tensor:
        return strided((b, heads, t, d), next(layouts), dtype, draw)

    depth_k, depth_v = [tensor(hk) for _ in range(s)], [tensor(hk) for _ in range(s)]
    options: dict[str, Any] = dict(is_causal=case["causal"], scale=scale)
    options["lowering"] = chosen_lowering(case)
    layers = [tuple(tensor(n) for n in (hq, hq, hk, hk)) for _ in range(max(count))]
    made, saved = [], []
    for number, (grad, q, k, v) in enumerate(layers):
        # A reader of fewer slots does not see the last ones.
        seen = sum(number < readers for readers in count)
        own = (q, k, v, depth_k[:seen], depth_v[:seen])
        out, lse = split.forward(*own, **options)
        made.append(split.query_backward(grad, *own, out, lse, **options))
        saved.append((grad, q, lse, made[-1][4]))
    # What a key's or a value's gradient is added to: of some slots one of them, of others both.
    starts: list[Tensor | None] = [None] * (2 * s)
    for place in case.get("starts", ()):
        starts[place] = strided((b, hk, t, d), next(layouts), DTYPES[case["acc"]], draw)
    gradients = gathered(
        case, [*map(list, zip(*saved, strict=True))], depth_k, depth_v, scale,
        starts if case.get("starts") else [],
    )  # fmt: skip

    def reference(compute: torch.dtype) -> list[Tensor]:
        slots = torch.stack([torch.stack(x) for x in (depth_k, depth_v)]).to(compute)
        total, first = torch.zeros_like(slots), []
        for number, (grad, *own) in enumerate(layers):
            seen = sum(number < readers for readers in count)
            leaves = [x.to(compute).requires_grad_() for x in (*own, *slots[:, :seen])]
            exact, _ = oracle(*leaves, causal=case["causal"], scale=scale)
            grads = torch.autograd.grad(exact, leaves, grad.to(compute))
            total[:, :seen] += torch.stack(grads[3:])
            first = first or list(grads[:3])
        for place, start in enumerate(starts):
            if start is not None:
                total[place % 2, place // 2] += start
        return [*first, *total]

    got = [*made[0][:3], gradients[:, 0], gradients[:, 1]]
    exact, eager = reference(torch.float64), reference(dtype)
    return {
        "error": {n: relative(x, y) for n, x, y in zip(NAMES[2:], got, exact, strict=True)},
        "eager": {n: relative(x, y) for n, x, y in zip(NAMES[2:], eager, exact, strict=True)},
        "untouched": True,
        "token_major": gradients.transpose(3, 4).is_contiguous(),
        "dtypes": [str(x.dtype) for x in (made[0][0], made[0][4], *made[0][:3])],
    }


def gathered(
    case: dict[str, Any],
    readers: list[Any],
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
    starts: list[Tensor | None],
) -> Tensor:
    """All slots' gradients; those of the first case["begun"] begun with what the others read."""
    count, begun = case["readers"], case.get("begun", 0)
    options: dict[str, Any] = dict(scale=scale, dtype=DTYPES[case["acc"]])
    if not begun:
        return split.gather(*readers, keys, values, count, starts=starts, **options)[0]
    ran = count[begun]
    turned = [side[begun:] + side[:begun] for side in (keys, values)]
    made, sums = split.gather(
        *(x[:ran] for x in readers), *turned, [*count[begun:], *[ran] * begun],
        starts=starts[2 * begun :], unfinished=begun, **options,
    )  # fmt: skip
    assert (sums.dtype, sums.shape) == (torch.float32, (begun, *made.shape[1:]))
    assert sums.transpose(3, 4).is_contiguous()
    if case.get("turned"):  # sums that lie otherwise
        sums = sums.mT.contiguous().mT
    late, missing = [x[ran:] for x in readers], [x - ran for x in count[:begun]]
    whole, _ = split.gather(
        *late, keys[:begun], values[:begun], missing,
        starts=starts[: 2 * begun], partials=sums, **options,
    )  # fmt: skip
    both = torch.cat([whole.transpose(3, 4), made.transpose(3, 4)])
    return both.transpose(3, 4)


def through_the_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    grad_out: Tensor,
    grad_lse: Tensor,
    depth_grad_query: Tensor,
) -> list[Tensor]:
    """dq, dk, dv of the whole attention: autograd through a sequence part that is not ours."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    # Rows without a key get finite scores here; the gradients that come for them are 0.
    group = q.shape[1] // k.shape[1]
    z = torch.einsum("bhtd,bhud->bhtu", wide[0], wide[1].repeat_interleave(group, 1)) * scale
    if mask is not None:
        z = z.masked_fill(~mask, -1e3)
    out, lse = z.softmax(-1) @ wide[2].repeat_interleave(group, 1), z.logsumexp(-1)
    made = torch.autograd.grad([out, lse], wide, [grad_out.double(), grad_lse.double()])
    made = (made[0] + depth_grad_query.double(), *made[1:])
    return [x.transpose(1, 2).contiguous().transpose(1, 2).to(q.dtype) for x in made]


if __name__ == "__main__":
    report(cases(), run)
