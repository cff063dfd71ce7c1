"""What a program of the decode kernel computes of the joint softmax of a few queries.

States of rows are (m, w, t) as `decode` defines them. For numbers, shapes and launches see there.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moda_compile.kernels.slot_table import listed_number
from moda_compile.kernels.tiles import ask_for, product, slot_rows
from moda_compile.kernels.visible import visible_range


@triton.jit
def _added(bias):
    """An additive mask's numbers as `masks.absorbed` has them, in float32.

    Numbers below -2^24 leave no bit for a score of size 1: they become -2^100, all the same.
    Compared before float64 is narrowed, as none of its finite numbers may become -inf.
    """
    if bias.dtype != tl.float64:
        bias = bias.to(tl.float32)
    huge = (bias < -16777216.0) & (bias != float("-inf"))
    return tl.where(huge, -1267650600228229401496703205376.0, bias).to(tl.float32)


@triton.jit
def slot_tile(
    slot,
    batch,
    kv_head,
    token,
    source,
    table,
    slots,
    stride_slot,
    stride_batch,
    stride_head,
    stride_token,
    a0, a1, a2, a3, a4, a5, a6, a7,
    a8, a9, a10, a11, a12, a13, a14, a15,
    a16, a17, a18, a19, a20, a21, a22, a23,
    a24, a25, a26, a27, a28, a29, a30, a31,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    LISTED: tl.constexpr,
    UNIFORM: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
):  # fmt: skip
    """Keys, or values, [SLOTS, d] of these slots of one token. LISTED: a0, .. are their addresses;
    otherwise as `tiles.slot_rows` has them, FIRST being the side's first column of a table.
    """
    dim = tl.arange(0, PADDED_DIM)
    slot_live = slot < slots
    if LISTED:
        address = listed_number(
            slot,
            a0, a1, a2, a3, a4, a5, a6, a7,
            a8, a9, a10, a11, a12, a13, a14, a15,
            a16, a17, a18, a19, a20, a21, a22, a23,
            a24, a25, a26, a27, a28, a29, a30, a31,
        )  # fmt: skip
        # Triton notes the alignment at the last addition, and drops an addition of 0 with the note.
        row = batch * stride_batch + kv_head * stride_head + tl.cast(token, tl.int64) * stride_token
        rows = address.to(tl.pointer_type(source.dtype.element_ty)) + row
    else:
        one = tl.arange(0, 1)  # row
        rows = slot_rows(
            source, table, slot.to(tl.int64), slot_live, batch, kv_head + one,
            (token + one).to(tl.int64), (stride_slot, stride_batch, stride_head, stride_token),
            FIRST, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        rows = tl.reshape(rows, (SLOTS,))
    rows = tl.multiple_of(rows, [SLOT_ALIGN])
    live = slot_live[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(rows[:, None] + dim[None, :], mask=live, other=0.0)


@triton.jit
def with_slots(maximum, weight, total, q, k, v, slot_live, scale, EMULATED: tl.constexpr):
    """The state of the rows of q [rows, d] with slots k, v [SLOTS, d], the first of them live."""
    LOG2E: tl.constexpr = 1.4426950408889634
    z = product(q, tl.trans(k), EMULATED) * tl.cast(scale, tl.float32)
    z = tl.where(slot_live[None, :], z, float("-inf"))
    of_slots = tl.max(z, 1)
    p = tl.exp2((z - of_slots[:, None]) * LOG2E)
    return joined(
        maximum, weight, total, of_slots, tl.sum(p, 1), product(p.to(v.dtype), v, EMULATED)
    )


@triton.jit
def joined(maximum, weight, total, other_maximum, other_weight, other_total):
    """The state of what two states stand for together."""
    LOG2E: tl.constexpr = 1.4426950408889634
    new_maximum = tl.maximum(maximum, other_maximum)
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    shrink = tl.exp2((maximum - pivot) * LOG2E)
    other_shrink = tl.exp2((other_maximum - pivot) * LOG2E)
    weight = weight * shrink + other_weight * other_shrink
    total = total * shrink[:, None] + other_total * other_shrink[:, None]
    return new_maximum, weight, total


@triton.jit
def ask_for_keys(
    start, first, last, stride_token, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """`ask_for` the first KEYS rows of [first, last).

    start: of a batch entry's keys or values of one head.
    """
    if first < last:
        u = first + tl.arange(0, KEYS)
        rows = start + u.to(tl.int64) * stride_token
        ask_for(rows[:, None], (u < last)[:, None], HEAD_DIM, PADDED_DIM)


@triton.jit
def with_keys(
    maximum,
    weight,
    total,
    q,
    row,
    row_live,
    first,
    last,
    batch,
    kv_head,
    key,
    value,
    mask,
    ranges,
    queries,
    keys,
    scale,
    key_stride_batch,
    key_stride_head,
    key_stride_token,
    value_stride_batch,
    value_stride_head,
    value_stride_token,
    mask_stride_batch,
    mask_stride_head,
    mask_stride_query,
    mask_stride_key,
    ranges_stride_batch,
    ranges_stride_head,
    mask_chunks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    MASK_CHUNK: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """The state of the rows with what they see of the keys [first, last) of one key/value head."""
    LOG2E: tl.constexpr = 1.4426950408889634
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM
    factor = tl.cast(scale, tl.float32)
    token = (row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    lane = tl.arange(0, KEYS)
    key_start = key + batch * key_stride_batch + kv_head * key_stride_head
    value_start = value + batch * value_stride_batch + kv_head * value_stride_head
    mask_start = mask + batch * mask_stride_batch
    mask_rows = mask_start + head * mask_stride_head + token * mask_stride_query
    mask_row = mask_start + kv_head * GROUP * mask_stride_head
    # Query token i of Tq sees the keys u <= i + Tk - Tq.
    last_seen = token + (keys - queries)
    masked = True  # there is more to the mask than the range [first, last)
    if MASK != 0 and SHARED_MASK:
        own = ranges + batch * ranges_stride_batch + kv_head * ranges_stride_head
        first, last, plain = visible_range(own, first, last, mask_chunks, MASK_CHUNK)
        masked = plain == 0
    # From 0: Triton lets the loads of a loop run ahead only if it starts where no load decides.
    for step in range(0, tl.cdiv(last - first, KEYS)):
        u = (first + step * KEYS + lane).to(tl.int64)
        seen = u < last
        visible = row_live[:, None] & seen[None, :]
        bias = tl.zeros([1, KEYS], tl.float32)
        if CAUSAL:
            visible &= u[None, :] <= last_seen[:, None]
        if MASK != 0:
            # Keys that no row of this program sees are not read, and of no account.
            if SHARED_MASK:
                # The loads of keys wait for this one. It takes no time where `masked` rules
                # it out.
                entry = mask_row + u * mask_stride_key
                if MASK == 1:
                    seen &= tl.load(entry, mask=seen & masked, other=1).to(tl.int1)
                else:
                    read = _added(tl.load(entry, mask=seen & masked, other=0.0))
                    seen &= read != float("-inf")
                    bias = read[None, :]
                visible &= seen[None, :]
            else:
                entry = mask_rows[:, None] + (u * mask_stride_key)[None, :]
                if MASK == 1:
                    visible &= tl.load(entry, mask=visible, other=0).to(tl.int1)
                else:
                    bias = _added(tl.load(entry, mask=visible, other=float("-inf")))
                    visible &= bias != float("-inf")
                seen = tl.max(visible.to(tl.int32), 0) > 0
        load_live = seen[:, None] & dim_live[None, :]
        key_rows = tl.multiple_of(key_start + u * key_stride_token, [KEY_ALIGN])
        k = tl.load(key_rows[:, None] + dim[None, :], mask=load_live, other=0.0)
        value_rows = tl.multiple_of(value_start + u * value_stride_token, [VALUE_ALIGN])
        v = tl.load(value_rows[:, None] + dim[None, :], mask=load_live, other=0.0)
        z = product(q, tl.trans(k), EMULATED) * factor
        if MASK == 2:
            z += bias
        z = tl.where(visible, z, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(z, 1))
        # Where nothing is visible yet -inf - -inf would be NaN. The difference is taken before
        # it is converted to base 2: no finite mask overflows, and equal huge ones differ by 0.
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = tl.exp2((maximum - pivot) * LOG2E)
        p = tl.exp2((z - pivot[:, None]) * LOG2E)
        weight = weight * shrink + tl.sum(p, 1)
        total = total * shrink[:, None] + product(p.to(v.dtype), v, EMULATED)
        maximum = new_maximum
    return maximum, weight, total
