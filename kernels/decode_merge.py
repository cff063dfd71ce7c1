"""Join the parts of a few queries' attention; `decode` says what they are, and launches it."""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit(do_not_specialize=["parts", "entries"])
def decode_merge_kernel(
    partial,
    out,
    lse,
    queries,
    kv_heads,
    parts,
    entries,
    out_stride_batch,
    out_stride_head,
    out_stride_token,
    lse_stride_batch,
    lse_stride_head,
    lse_stride_token,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Write out and lse of one row, joining its parts; shapes as in `run`, strides in elements.

    A program a row, not a (batch, key/value head): few tokens make few programs. DEPENDENT: as for
    the kernel that writes the parts.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    rows = queries * GROUP
    row = program % rows
    pair = program // rows
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64) * GROUP + row % GROUP
    token = (row // GROUP).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM

    maximum = float("-inf")
    weight = 0.0
    total = tl.zeros([PADDED_DIM], tl.float32)
    index = program.to(tl.int64) * parts
    maximum_start = partial + tl.cast(entries, tl.int64) * WIDTH
    if DEPENDENT:
        gdc_wait()
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        live = part < parts
        entry = index + part
        m = tl.load(maximum_start + entry, mask=live, other=float("-inf"))
        w = tl.load(maximum_start + entries + entry, mask=live, other=0.0)
        total_rows = tl.multiple_of(partial + entry * WIDTH, [16])
        t = tl.load(
            total_rows[:, None] + dim[None, :], mask=live[:, None] & dim_live[None, :], other=0.0
        )
        new_maximum = tl.maximum(maximum, tl.max(m, 0))
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = tl.exp2((maximum - pivot) * LOG2E)
        p = tl.exp2((m - pivot) * LOG2E)
        weight = weight * shrink + tl.sum(w * p, 0)
        total = total * shrink + tl.sum(t * p[:, None], 0)
        maximum = new_maximum

    # Without slots a row may have seen nothing at all: its out is 0 and its lse -inf.
    total = total / tl.where(weight == 0.0, 1.0, weight)
    out_row = out + batch * out_stride_batch + head * out_stride_head + token * out_stride_token
    out_row = tl.multiple_of(out_row, [ALIGN])
    tl.store(out_row + dim, total.to(out.dtype.element_ty), mask=dim_live)
    lse_row = lse + batch * lse_stride_batch + head * lse_stride_head + token * lse_stride_token
    tl.store(lse_row, maximum + tl.log2(weight) * LN2)
