"""Forward of the combined attention in one kernel: a token's keys, then its slots.

The portable lowering: it needs nothing but Triton. A program has TOKENS tokens and all query heads
of one key/value head, as rows r = (token, head); one online softmax goes over the sequence's keys,
a tile of KEYS at a time by matrix products, and then over the slots, one at a time: a slot's row
belongs to one token, so its scores are sums along head_dim. Source: arXiv 2603.15619, section 3.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import configs, launch, slot_table, tiles
from moda_compile.kernels.tiles import load_sides, product, row_offsets


@triton.jit
def program_tokens(
    queries, kv_heads, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, TOKENS: tl.constexpr
):
    """This program's batch, key/value head and block of tokens; of each row token, query head, and
    whether it exists.

    The last tokens, which see the most keys, go first: the short programs fill up the end.
    """
    blocks = tl.cdiv(queries, TOKENS)
    pair = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    row = tl.arange(0, TOKENS * PADDED_GROUP)
    token = (block * TOKENS + row // PADDED_GROUP).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    member = row % PADDED_GROUP
    live = (token < queries) & (member < GROUP)
    return (pair // kv_heads).to(tl.int64), kv_head, block, token, kv_head * GROUP + member, live


@triton.jit
def load_rows(start, offsets, dim, live, ALIGN: tl.constexpr):
    """A tile [row, head_dim] of the rows at start + offsets."""
    rows = tl.multiple_of(start + offsets, [ALIGN])
    return tl.load(rows[:, None] + dim[None, :], mask=live, other=0.0)


@triton.jit
def last_key(block, queries, keys, CAUSAL: tl.constexpr, TOKENS: tl.constexpr):
    """Behind the last key that a block of tokens sees."""
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (block + 1) * TOKENS + (keys - queries))
    return end


@triton.jit
def sees(
    token, u, queries, keys, row_live, mask_rows, mask_stride_key,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Whether each row sees each of the keys u: [row, key]."""
    visible = row_live[:, None] & (u < keys)[None, :]
    if CAUSAL:
        visible &= u[None, :] <= (token + (keys - queries))[:, None]
    if MASKED:
        entries = mask_rows[:, None] + (u * mask_stride_key)[None, :]
        visible &= tl.load(entries, mask=visible, other=0).to(tl.int1)
    return visible


@triton.jit
def fused_forward_kernel(
    query,
    key,
    value,
    mask,
    out,
    lse,
    slot_key,
    slot_value,
    table,
    queries,
    keys,
    slots,
    kv_heads,
    scale,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    out_strides,
    lse_strides,
    slot_key_strides,
    slot_value_strides,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Write out and lse; shapes as in `run`. Strides are tuples, in elements: (batch, head, token),
    of the mask (batch, head, query, key), of slots (slot, batch, head, token).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    batch, kv_head, block, token, head, row_live = program_tokens(
        queries, kv_heads, GROUP, PADDED_GROUP, TOKENS
    )
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM
    live = row_live[:, None] & dim_live[None, :]
    factor = tl.cast(scale, tl.float32) * LOG2E

    q = load_rows(query, row_offsets(batch, head, token, query_strides), dim, live, ALIGN)
    maximum = tl.full([TOKENS * PADDED_GROUP], float("-inf"), tl.float32)
    weight = tl.zeros([TOKENS * PADDED_GROUP], tl.float32)
    total = tl.zeros([TOKENS * PADDED_GROUP, PADDED_DIM], tl.float32)

    key_start = key + batch * key_strides[0] + kv_head * key_strides[1]
    value_start = value + batch * value_strides[0] + kv_head * value_strides[1]
    mask_rows = mask + row_offsets(batch, head, token, mask_strides)
    for first in range(0, last_key(block, queries, keys, CAUSAL, TOKENS), KEYS):
        u = (first + tl.arange(0, KEYS)).to(tl.int64)
        visible = sees(
            token, u, queries, keys, row_live, mask_rows, mask_strides[3], CAUSAL, MASKED
        )
        key_live = (u < keys)[:, None] & dim_live[None, :]
        k = load_rows(key_start, u * key_strides[2], dim, key_live, ALIGN)
        v = load_rows(value_start, u * value_strides[2], dim, key_live, ALIGN)
        z = tl.where(visible, product(q, tl.trans(k), EMULATED) * factor, float("-inf"))
        most = tl.maximum(maximum, tl.max(z, 1))
        # Where nothing is visible yet -inf - -inf would be NaN.
        pivot = tl.where(most == float("-inf"), 0.0, most)
        shrink = tl.exp2(maximum - pivot)
        p = tl.exp2(z - pivot[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        total = total * shrink[:, None] + product(p.to(v.dtype), v, EMULATED)
        maximum = most
    # A row that saw nothing: 0 times what other rows' values hold, which need not be finite.
    total = tl.where((weight == 0.0)[:, None], 0.0, total)

    wide_q = q.to(tl.float32)
    for slot in range(0, slots):
        both = load_sides(
            slot_key, slot_value, table, slot, slots, batch, kv_head, token, dim, live,
            slot_key_strides, slot_value_strides, 1, COLUMNS, TABLE, UNIFORM, ALIGN,
        )  # fmt: skip
        k, v = both[0][0], both[1][0]
        score = tl.sum(wide_q * k.to(tl.float32), 1) * factor
        most = tl.maximum(maximum, score)
        shrink = tl.exp2(maximum - most)
        p = tl.exp2(score - most)
        weight = weight * shrink + p
        total = total * shrink[:, None] + p[:, None] * v.to(tl.float32)
        maximum = most

    # Without slots a row may have seen nothing at all: its out is 0 and its lse -inf.
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    cells = tl.multiple_of(out + row_offsets(batch, head, token, out_strides), [ALIGN])
    tl.store(cells[:, None] + dim[None, :], total.to(out.dtype.element_ty), mask=live)
    entries = lse + row_offsets(batch, head, token, lse_strides)
    tl.store(entries, (maximum + tl.log2(weight)) * LN2, mask=row_live)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: slot_table.Slots | None,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention over the keys and the depth slots.

    Args:
        q: queries [B, Hq, Tq, d]. k, v: keys and values [B, Hk, Tk, d], Hq a multiple of Hk; Tk
            may be 0. Any strides.
        slots: the depth slots, each [B, Hk, Tq, d], as one tensor or behind a table; or None.
        is_causal: query token i sees the keys u <= i + Tk - Tq.
        scale: factor of every score.
        mask: of the sequence, bool, broadcastable to [B, Hq, Tq, Tk].

    Returns:
        out [B, Hq, Tq, d] in [B, Tq, Hq, d] memory order, and the joint lse [B, Hq, Tq], float32,
        natural log. A row without a visible key gives all its weight to the slots; without slots
        its out is 0 and its lse -inf.
    """
    b, hq, queries, d = q.shape
    hk, keys = k.shape[1], k.shape[2]
    group = hq // hk
    out = launch.token_major_empty(q, q.shape)
    lse = q.new_empty((b, hq, queries), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    q, k, v = launch.unit_rows(q), launch.unit_rows(k), launch.unit_rows(v)
    read = slots or slot_table.none(q)
    tile = configs.fused_tile(
        head_dim=d, group=group, dtype=q.dtype, capability=launch.capability(q)
    )
    with launch.on_device(q):
        launch.launchable(fused_forward_kernel)[(b * hk * -(-queries // tile.tokens),)](
            q,
            k,
            v,
            q if mask is None else mask,
            out,
            lse,
            read.key,
            read.value,
            read.table,
            queries,
            keys,
            read.count,
            hk,
            scale,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            mask_strides(mask, (b, hq, queries, keys)),
            out.stride()[:3],
            lse.stride(),
            read.key_strides,
            read.value_strides,
            GROUP=group,
            PADDED_GROUP=configs.power_of_two(group),
            HEAD_DIM=d,
            PADDED_DIM=configs.padded(d),
            TOKENS=tile.tokens,
            KEYS=tile.keys,
            CAUSAL=is_causal,
            MASKED=mask is not None,
            COLUMNS=tiles.TABLE_COLUMNS,
            TABLE=read.is_table,
            UNIFORM=read.is_uniform,
            ALIGN=min(launch.alignment(q, k, v, out), read.align),
            EMULATED=launch.EMULATED,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


def mask_strides(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a mask that is broadcast to [B, Hq, Tq, Tk]; zeros for none."""
    return (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()
