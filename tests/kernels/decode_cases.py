"""Run the decode kernels in Triton's interpreter and print their errors, one JSON line a case.

A script, as interpreter_cases.py beside it and for the same reason. Run by test_decode.py; by
hand: TRITON_INTERPRET=1 python tests/kernels/decode_cases.py
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from moda_compile.kernels import MASK_CHUNK, decode, masks, slot_table, split, visible  # noqa: E402
from tests.kernels.script import report  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SLOTS = ("listed", "table", "stacked")
BASE: dict[str, Any] = dict(
    dtype="bf16", b=1, hk=1, g=2, q=1, t=77, d=16, s=5, slots="listed", causal=False, mask="",
    layout="token_major", splits=None, check="oracle", poison="",
)  # fmt: skip


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
    """The definition (arXiv 2603.15619, section 3), the last query aligned to the last key.

    q [B, Hq, Tq, d]; k, v [B, Hk, Tk, d]; depth_k, depth_v [S, B, Hk, Tq, d]. In the dtype of q.
    """
    (hq, queries), (hk, keys) = q.shape[1:3], k.shape[1:3]
    k, v = (x.repeat_interleave(hq // hk, 1) for x in (k, v))
    depth_k, depth_v = (x.repeat_interleave(hq // hk, 2) for x in (depth_k, depth_v))
    z = q @ k.mT * scale
    if is_causal:
        future = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
        z = z.masked_fill(future, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        z = z.masked_fill(~mask, -math.inf)
    elif mask is not None:
        z = z + mask.to(q.dtype)
    z = torch.cat([z, torch.einsum("bhtd,sbhtd->bhts", q, depth_k) * scale], -1)
    dead = (z == -math.inf).all(-1, keepdim=True)
    p = z.masked_fill(dead, 0.0).softmax(-1) if z.shape[-1] else z
    p = p.masked_fill(dead, 0.0)
    out = p[..., :keys] @ v + torch.einsum("bhts,sbhtd->bhtd", p[..., keys:], depth_v)
    return out, z.logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf)


def relative(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||; NaN where x is -inf, or huge and negative, and exact is not."""
    far = exact < -1e30
    if not torch.equal(x.double() < -1e30, far) or not torch.equal(x.isneginf(), exact.isneginf()):
        return math.nan
    if far.all():
        return 0.0
    return ((x.double() - exact)[~far].norm() / exact[~far].norm().clamp(min=1e-9)).item()


def strided(b: int, h: int, t: int, d: int, layout: str, dtype: torch.dtype, draw: Any) -> Tensor:
    """A random tensor [B, H, T, d] that lies in memory as `layout` says."""
    if layout == "head_major":
        return draw(b, h, t, d).to(dtype)
    if layout == "token_major":
        return draw(b, t, h, d).to(dtype).transpose(1, 2)
    if layout == "cache":  # the first t tokens of a longer static cache, the rest of it NaN
        buffer = torch.full((b, h, t + 50, d), math.nan, dtype=dtype)
        buffer[:, :, :t] = draw(b, h, t, d).to(dtype)
        return buffer[:, :, :t]
    if layout == "odd_offset":  # rows that start on no boundary wider than an element
        return draw(b * t * h * d + 1).to(dtype)[1:].view(b, t, h, d).transpose(1, 2)
    if layout == "dim_major":  # last stride not 1
        return draw(b, h, d, t).to(dtype).mT
    if layout == "expanded":  # one batch entry for all
        return draw(1, t, h, d).to(dtype).transpose(1, 2).expand(b, h, t, d)
    raise ValueError(layout)


LAYOUTS = ("token_major", "head_major", "cache", "odd_offset", "dim_major", "expanded")


def make_mask(kind: str, b: int, heads: int, queries: int, keys: int, draw: Any) -> Tensor | None:
    """Masks as models and users write them; "dead": the first row sees no key."""
    row = torch.arange(keys - queries, keys)[:, None]
    column = torch.arange(keys)[None, :]
    batch = torch.arange(b)[:, None, None, None]
    seen = (column <= row).expand(b, 1, queries, keys)
    dead = seen & ~((column.new_zeros(1, 1, queries, 1) + torch.arange(queries)[:, None]) == 0)
    if kind == "position":  # of a static cache: what is written so far
        return (torch.arange(keys) <= keys // 2)[None, None, None, :]
    if kind == "far":  # of rows of many chunks: keys on both sides of where one ends, and a hole
        seen = column > keys - 180
        return (seen & (column != keys - 90)).expand(b, 1, 1, keys)
    if kind == "window":
        return (column > row - 9) & (column <= row)
    if kind == "left_padding":
        return seen & (column >= 3 * batch + 2)
    if kind == "per_head":
        return draw(b, heads, queries, keys) > 0
    if kind == "dead":
        return dead
    if kind == "dead_head":
        return (torch.arange(heads) > 0)[None, :, None, None].expand(b, -1, queries, keys)
    if kind == "all_dead":
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    if kind.startswith("-inf"):
        dtype = DTYPES[kind[5:]]
        return torch.zeros(dead.shape, dtype=dtype).masked_fill(~dead, -math.inf)
    if kind.startswith("smallest"):  # rows of nothing else see all their keys alike
        dtype = {"fp64": torch.float64, **DTYPES}[kind[9:]]
        return torch.zeros(dead.shape, dtype=dtype).masked_fill(~dead, torch.finfo(dtype).min)
    if kind == "largest":
        bias = torch.zeros(queries, keys)
        bias[:, 3::7] = torch.finfo(torch.float32).max
        return bias
    if kind == "alibi":
        slopes = torch.linspace(0.01, 0.5, heads)[:, None, None]
        return (slopes * (column - row).abs().neg())[None]
    if kind == "alibi_bf16":
        return draw(heads, 1, keys).bfloat16()
    if kind == "transposed":  # strides in another order
        return draw(b, 1, keys, queries).half().mT
    if kind == "one_number":
        return torch.full((), 0.5)
    if kind == "per_query":
        return draw(queries, 1)
    assert not kind
    return None


BOOL_MASKS = ("position", "window", "left_padding", "per_head", "dead", "all_dead")
ADDITIVE_MASKS = (
    "-inf fp32", "-inf bf16", "smallest fp32", "smallest bf16", "smallest fp16", "smallest fp64",
    "largest", "alibi", "alibi_bf16", "transposed", "one_number", "per_query",
)  # fmt: skip


def cases() -> Iterator[dict[str, Any]]:
    """Every value of every parameter occurs with several of the others; sizes are odd and small."""
    for dtype, slots, causal in itertools.product(DTYPES, SLOTS, (False, True)):
        yield BASE | dict(dtype=dtype, slots=slots, causal=causal, q=3, t=131, hk=2)
    for d in (1, 16, 24, 64, 80, 128, 256):
        yield BASE | dict(d=d, g=3)
    for d in (5, 80, 256):
        yield BASE | dict(d=d, g=3, dtype="fp32")
    for g, queries in itertools.product((1, 3, 8), (1, 2, 5, 16)):
        yield BASE | dict(g=g, q=queries, causal=True, dtype="fp16", t=65, b=1 + (queries < 3))
    yield BASE | dict(g=20, q=5, causal=True, t=25)  # several tiles of rows
    yield BASE | dict(g=3, q=7, causal=True, dtype="fp32", hk=2, t=25)
    for s, slots in itertools.product((0, 1, 32, 33), SLOTS):
        yield BASE | dict(s=s, slots=slots, dtype="fp32", b=2, hk=2, t=25)
    for t, s in itertools.product((0, 1, 2, 64, 65, 300), (0, 5)):
        yield BASE | dict(t=t, s=s, q=2, causal=t % 2 == 0)
    for layout in LAYOUTS:
        yield BASE | dict(layout=layout, q=2, hk=2, d=24, slots="stacked", causal=True, t=25)
        yield BASE | dict(layout=layout, b=2, hk=2, d=24, dtype="fp32", mask="left_padding", t=25)
    yield BASE | dict(layout="mixed", s=9, q=2, hk=2)  # the table's per-slot strides
    for mask in (*BOOL_MASKS, *ADDITIVE_MASKS):
        yield BASE | dict(mask=mask, q=3, dtype="fp32", splits=2, t=39)
        if mask in (*BOOL_MASKS[3:], *ADDITIVE_MASKS[:7]):
            yield BASE | dict(mask=mask, q=3, s=0, dtype="fp32", splits=2, t=39)
    for mask in ("position", "left_padding", "-inf fp32", "alibi", "alibi_bf16"):
        for g in (1, 2):
            yield BASE | dict(mask=mask, g=g, t=150, s=0)
    for mask in ("per_head", "left_padding", "alibi", "alibi_bf16", "transposed", "per_query"):
        yield BASE | dict(mask=mask, b=2, hk=2, g=1, q=2, t=25)
    yield BASE | dict(mask="left_padding", b=2, causal=True, q=5)
    for mask, g in itertools.product(("position", "left_padding", "-inf fp32", "far"), (1, 2)):
        yield BASE | dict(mask=mask, g=g, hk=2, b=2, check="seen")
    yield BASE | dict(mask="per_head", g=1, hk=3, b=2, check="seen")
    # Rows that are looked at in several chunks, and in more than a program reads at once.
    for t, splits in itertools.product((4096 + 60, 33 * 4096 + 7), (1, 2)):
        for check in ("oracle", "unread", "seen"):
            yield BASE | dict(mask="far", b=2, t=t, splits=splits, check=check)
    # Of 200 keys the last split has few: a row of nothing but huge numbers sees all of them alike.
    yield BASE | dict(mask="smallest fp32", causal=True, q=5, g=1, s=0, t=200, splits=2)
    yield BASE | dict(mask="smallest fp32", t=300, q=3, s=0, splits=5)
    for mask, s in itertools.product(("", "window", "smallest fp32", "-inf fp16"), (0, 5)):
        yield BASE | dict(mask=mask, s=s, q=7, t=7, check="split.forward", causal=not mask)
    # One program for all that a key/value head's queries see: it writes out and lse itself.
    whole = BASE | dict(splits=1, hk=2)
    for dtype, slots in itertools.product(DTYPES, SLOTS):
        yield whole | dict(dtype=dtype, slots=slots, b=2, g=3, d=24, s=33, t=131)
    for t, s in itertools.product((0, 1, 65), (0, 1, 5)):
        yield whole | dict(t=t, s=s, causal=True, dtype="fp32")
    for mask, s in itertools.product(("position", "all_dead", "smallest fp32", "alibi"), (0, 5)):
        yield whole | dict(mask=mask, s=s, t=39, g=1)
    for poison in ("q", "k", "slot"):
        yield whole | dict(poison=poison, check="nan")
    yield whole | dict(mask="position", check="unread")
    for program in (whole, BASE | dict(splits=2)):
        yield program | dict(mask="dead_head", check="apart", g=3)
    for dtype in DTYPES:
        yield BASE | dict(t=200, q=2, dtype=dtype, check="splits", causal=True)
    yield BASE | dict(t=200, q=2, s=0, mask="smallest fp32", check="splits")
    yield BASE | dict(t=200, q=5, mask="per_head", check="twice", splits=4)
    for poison, s in itertools.product(("q", "k", "v", "mask"), (0, 5)):
        yield BASE | dict(poison=poison, s=s, hk=2, mask="alibi", check="nan", splits=2)
    yield BASE | dict(poison="slot", q=2, check="nan")
    yield BASE | dict(mask="position", check="unread")
    yield BASE | dict(mask="left_padding", b=2, check="unread", q=2, splits=2, dtype="fp32")


def looked_at(mask: Tensor, batches: int, heads: int) -> Tensor:
    """What `visible.run` is to say of a mask [B, H, Tq, Tk], key by key."""
    rows = mask[:batches, :heads, 0]
    seen = rows if mask.dtype == torch.bool else rows != -math.inf
    plain = rows if mask.dtype == torch.bool else rows == 0
    found = []
    for at in range(0, mask.shape[3], MASK_CHUNK):
        key = torch.arange(at, min(at + MASK_CHUNK, mask.shape[3]))
        own, free = (x[..., at : at + MASK_CHUNK] for x in (seen, plain))
        first = key.where(own, 2**31 - 1).amin(-1)
        found.append(torch.stack([first, key.where(own, -1).amax(-1), free.sum(-1)], -1))
    return torch.stack(found, -1).reshape(batches, heads, -1).int()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Errors by name, and the largest allowed; or whether another check holds."""
    generator = torch.Generator().manual_seed(0)
    dtype, layout = DTYPES[case["dtype"]], case["layout"]
    b, hk, queries, keys, d, s = (case[x] for x in ("b", "hk", "q", "t", "d", "s"))
    hq, scale = hk * case["g"], d**-0.5

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layouts = itertools.cycle(LAYOUTS) if layout == "mixed" else itertools.repeat(layout)
    q = strided(b, hq, queries, d, next(layouts), dtype, draw)
    k, v = (strided(b, hk, keys, d, next(layouts), dtype, draw) for _ in range(2))
    depth = [strided(b, hk, queries, d, next(layouts), dtype, draw) for _ in range(2 * s)]
    empty = torch.empty(0, b, hk, queries, d, dtype=dtype)
    stack_k, stack_v = (torch.stack(x) if s else empty for x in (depth[:s], depth[s:]))
    mask = make_mask(case["mask"], b, hq, queries, keys, draw)
    if case["poison"]:
        poisoned = {"q": q, "k": k, "v": v, "mask": mask, "slot": stack_k}[case["poison"]]
        assert poisoned is not None
        poisoned[(0,) * poisoned.dim()] = math.nan
        depth[:s] = list(stack_k.unbind(0))
    slots = None
    if case["slots"] == "stacked":
        slots = slot_table.stacked(stack_k, stack_v)
    elif s:
        slots = getattr(slot_table, case["slots"])(depth[:s], depth[s:])
    options: dict[str, Any] = dict(is_causal=case["causal"], scale=scale, mask=mask)
    out, lse = decode.run(q, k, v, slots, **options, splits=case["splits"])
    result: dict[str, Any] = dict(
        token_major=out.transpose(1, 2).is_contiguous() and lse.is_contiguous(),
        dtypes=[str(out.dtype), str(lse.dtype)],
    )

    def reference(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        return oracle(*(x.to(compute) for x in (q, k, v, stack_k, stack_v)), **options)

    exact, exact_lse = reference(torch.float64)
    result["error"] = dict(out=relative(out, exact), lse=relative(lse, exact_lse))
    result["eager"] = relative(reference(dtype)[0], exact)
    if case["check"] == "split.forward":
        ours, ours_lse = split.forward(q, k, v, depth[:s], depth[s:], **options)
        result["error"] |= dict(same=relative(out, ours.double()))
        result["error"] |= dict(same_lse=relative(lse, ours_lse.double()))
    elif case["check"] == "splits":
        for count in (1, 3):
            other, other_lse = decode.run(q, k, v, slots, **options, splits=count)
            result["error"][f"{count} splits"] = relative(out, other.double())
            result["error"][f"{count} splits lse"] = relative(lse, other_lse.double())
    elif case["check"] == "twice":
        again = decode.run(q, k, v, slots, **options, splits=case["splits"])
        result["holds"] = torch.equal(out, again[0]) and torch.equal(lse, again[1])
    elif case["check"] == "nan":  # where the oracle has it, and nowhere else
        result["holds"] = torch.equal(out.isnan(), exact.isnan())
        result["holds"] &= torch.equal(lse.isnan(), exact_lse.isnan())
        result["holds"] &= bool(out.isnan().any()) and not out.isnan().all()
        del result["error"]
    elif case["check"] == "apart":  # keys that the first head does not see, of which others do some
        again = decode.run(
            q, k, torch.full_like(v, math.inf), slots, **options, splits=case["splits"]
        )
        result["holds"] = torch.equal(out[:, 0], again[0][:, 0])
        result["holds"] &= torch.equal(lse, again[1])
    elif case["check"] == "seen":  # what all layers may share
        assert mask is not None
        rows = visible.distinct_rows(mask, case["g"], queries)
        distinct = masks.compact(mask)
        assert rows == distinct.shape[:2]
        seen = visible.run(mask, *rows)
        again = decode.run(q, k, v, slots, **options, seen=seen, splits=case["splits"])
        result["holds"] = torch.equal(seen, looked_at(distinct, *rows))
        result["holds"] &= torch.equal(out, again[0]) and torch.equal(lse, again[1])
    elif case["check"] == "unread":  # keys that the mask hides from all may hold anything
        assert mask is not None
        hidden = ~mask.expand(b, 1, queries, keys).any(2).squeeze(1)[:, None, :, None]
        garbage = [x.masked_fill(hidden, math.nan) for x in (k, v)]
        again = decode.run(q, *garbage, slots, **options, splits=case["splits"])
        result["holds"] = bool(hidden.any()) and torch.equal(out, again[0])
        result["holds"] &= torch.equal(lse, again[1])
    return result


if __name__ == "__main__":
    report(cases(), run)
