"""What a program of the decode kernel computes: one part of the joint softmax of a few queries.

A part is a split of the sequence's keys or a chunk of a token's slots; of each of its rows it
writes m, w and t as `decode` defines them. For numbers, shapes and launches see there.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moda_compile.kernels.tiles import product, slot_rows


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
def _visible_range(entries, first, last, mask_stride_key, MASK: tl.constexpr, SCAN: tl.constexpr):
    """(first, last) visible key + 1 of [first, last), and whether the mask is nothing else.

    entries: a row of the mask. What it hides at the ends, a cache's unused places or a padded
    prompt's start, is then not read, and what it leaves needs no look at the mask again.
    """
    lowest = tl.full([SCAN], 2147483647, tl.int32)
    highest = tl.full([SCAN], -1, tl.int32)
    free = tl.zeros([SCAN], tl.int32)
    for start in range(first, last, SCAN):
        u = start + tl.arange(0, SCAN)
        live = u < last
        entry = entries + u.to(tl.int64) * mask_stride_key
        if MASK == 1:
            seen = tl.load(entry, mask=live, other=0).to(tl.int1)
            plain = seen
        else:
            bias = tl.load(entry, mask=live, other=float("-inf"))
            seen = bias != float("-inf")
            plain = bias == 0.0
        lowest = tl.minimum(lowest, tl.where(seen, u, 2147483647))
        highest = tl.maximum(highest, tl.where(seen, u, -1))
        free += plain.to(tl.int32)
    begin = tl.minimum(tl.min(lowest, 0), last)  # nothing seen: an empty range
    end = tl.maximum(tl.max(highest, 0) + 1, begin)
    return begin, end, tl.sum(free, 0) == end - begin


@triton.jit
def slot_part(
    program,
    query,
    partial,
    slot_key,
    slot_value,
    table,
    slot,
    key_start,
    value_start,
    queries,
    slots,
    kv_heads,
    splits,
    chunks,
    entries,
    scale,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    slot_key_stride_slot,
    slot_key_stride_batch,
    slot_key_stride_head,
    slot_key_stride_token,
    slot_value_stride_slot,
    slot_value_stride_batch,
    slot_value_stride_head,
    slot_value_stride_token,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    LISTED: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """A chunk of SLOTS slots of one token, and SLOT_ROWS query heads of one key/value head."""
    LOG2E: tl.constexpr = 1.4426950408889634
    rows = queries * GROUP
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM
    factor = tl.cast(scale, tl.float32)
    maximum_start = partial + tl.cast(entries, tl.int64) * WIDTH
    blocks = tl.cdiv(GROUP, SLOT_ROWS)
    chunk = program % chunks
    parts = splits + chunks
    block = (program // chunks) % blocks
    token = (program // (chunks * blocks)) % queries
    pair = program // (chunks * blocks * queries)
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    member = block * SLOT_ROWS + tl.arange(0, SLOT_ROWS)
    member_live = member < GROUP
    slot_live = slot < slots
    own = (token + tl.arange(0, 1)).to(tl.int64)
    if LISTED:
        key_rows = key_start.to(tl.pointer_type(slot_key.dtype.element_ty))
        key_rows += batch * slot_key_stride_batch + kv_head * slot_key_stride_head
        key_rows += token.to(tl.int64) * slot_key_stride_token
        key_rows = tl.multiple_of(key_rows, [SLOT_ALIGN])
        value_rows = value_start.to(tl.pointer_type(slot_value.dtype.element_ty))
        value_rows += batch * slot_value_stride_batch + kv_head * slot_value_stride_head
        value_rows += token.to(tl.int64) * slot_value_stride_token
        value_rows = tl.multiple_of(value_rows, [SLOT_ALIGN])
    else:
        key_rows = slot_rows(
            slot_key, table, slot.to(tl.int64), slot_live, batch, kv_head, own,
            slot_key_stride_slot, slot_key_stride_batch, slot_key_stride_head,
            slot_key_stride_token, 0, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        value_rows = slot_rows(
            slot_value, table, slot.to(tl.int64), slot_live, batch, kv_head, own,
            slot_value_stride_slot, slot_value_stride_batch, slot_value_stride_head,
            slot_value_stride_token, 4, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        key_rows = tl.multiple_of(tl.reshape(key_rows, (SLOTS,)), [SLOT_ALIGN])
        value_rows = tl.multiple_of(tl.reshape(value_rows, (SLOTS,)), [SLOT_ALIGN])
    slot_load = slot_live[:, None] & dim_live[None, :]
    k = tl.load(key_rows[:, None] + dim[None, :], mask=slot_load, other=0.0)
    v = tl.load(value_rows[:, None] + dim[None, :], mask=slot_load, other=0.0)
    query_rows = query + batch * query_stride_batch + token.to(tl.int64) * query_stride_token
    query_rows += (kv_head * GROUP + member) * query_stride_head
    query_rows = tl.multiple_of(query_rows, [ALIGN])
    live = member_live[:, None] & dim_live[None, :]
    q = tl.load(query_rows[:, None] + dim[None, :], mask=live, other=0.0)
    z = product(q, tl.trans(k), EMULATED) * factor
    z = tl.where(slot_live[None, :], z, float("-inf"))
    maximum = tl.max(z, 1)
    p = tl.exp2((z - maximum[:, None]) * LOG2E)
    total = product(p.to(v.dtype), v, EMULATED)
    index = (pair.to(tl.int64) * rows + token * GROUP + member) * parts + splits + chunk
    total_rows = tl.multiple_of(partial + index * WIDTH, [16])
    tl.store(total_rows[:, None] + dim[None, :], total, mask=live)
    tl.store(maximum_start + index, maximum, mask=member_live)
    tl.store(maximum_start + entries + index, tl.sum(p, 1), mask=member_live)


@triton.jit
def split_part(
    program,
    query,
    key,
    value,
    mask,
    partial,
    queries,
    keys,
    kv_heads,
    row_blocks,
    splits,
    chunks,
    entries,
    split_keys,
    scale,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """A split of the keys of one key/value head, and ROWS rows."""
    LOG2E: tl.constexpr = 1.4426950408889634
    rows = queries * GROUP
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM
    factor = tl.cast(scale, tl.float32)
    maximum_start = partial + tl.cast(entries, tl.int64) * WIDTH
    parts = splits + chunks
    # Programs that read the same keys are neighbours.
    row_block = program % row_blocks
    split = (program // row_blocks) % splits
    pair = program // (row_blocks * splits)
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    row = row_block * ROWS + tl.arange(0, ROWS)
    row_live = row < rows
    token = (row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    lane = tl.arange(0, KEYS)

    query_rows = query + batch * query_stride_batch
    query_rows += head * query_stride_head + token * query_stride_token
    query_rows = tl.multiple_of(query_rows, [ALIGN])
    query_live = row_live[:, None] & dim_live[None, :]
    q = tl.load(query_rows[:, None] + dim[None, :], mask=query_live, other=0.0)
    key_start = key + batch * key_stride_batch + kv_head * key_stride_head
    value_start = value + batch * value_stride_batch + kv_head * value_stride_head
    mask_start = mask + batch * mask_stride_batch
    mask_rows = mask_start + head * mask_stride_head + token * mask_stride_query
    mask_row = mask_start + kv_head * GROUP * mask_stride_head
    # Query token i of Tq sees the keys u <= i + Tk - Tq.
    last_seen = token + (keys - queries)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    first = split * split_keys
    last = tl.minimum(first + split_keys, keys)
    masked = True  # there is more to the mask than the range [first, last)
    if MASK != 0 and SHARED_MASK:
        first, last, plain = _visible_range(mask_row, first, last, mask_stride_key, MASK, 16 * KEYS)
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

    # A row that saw nothing: 0 times what other rows' keys hold, which need not be finite.
    total = tl.where((weight == 0.0)[:, None], 0.0, total)
    index = (pair.to(tl.int64) * rows + row) * parts + split
    total_rows = tl.multiple_of(partial + index * WIDTH, [16])
    tl.store(total_rows[:, None] + dim[None, :], total, mask=query_live)
    tl.store(maximum_start + index, maximum, mask=row_live)
    tl.store(maximum_start + entries + index, weight, mask=row_live)
