"""Attention of a few query tokens over many keys and the depth slots: decoding with a KV cache.

Two launches. With rows r = (query token, query head) of one (batch, key/value head), and z as in
the README's equation, the first has one program for each split C of the keys; it writes, unscaled,

    m_C[r] = max z[u],   w_C[r] = sum exp(z[u] - m_C),   t_C[r] = sum exp(z[u] - m_C) v[u],  u in C

and the second, a program a row, joins the splits and the row's slots in one online softmax:

    out = sum_C exp(m_C - m) t_C + sum_i exp(z_i - m) v_i, over the same sum of w_C and 1

m_C and w_C are kept apart, not as one log-sum-exp: beside a maximum of -2^100, which a row of keys
all masked by huge numbers has (see `masks`), log(w_C) would be lost, and with it how many keys a
split stands for. No atomics: the same inputs give the same bits.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import configs, launch, slot_table, tiles
from moda_compile.kernels.tiles import slot_rows

NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2
_MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROW_ELEMENTS = 4  # rows of partial results start on 16-byte boundaries
_MULTIPROCESSORS = 132  # of an H100: assumed where a graph is traced without a GPU


@triton.jit
def _product(a, b, EMULATED: tl.constexpr):
    """a [m, k] x b [k, n] in float32; exact (ieee) for float32 operands. See `batched_dot`."""
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


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


# What changes with every token must not compile the kernels anew when it becomes a multiple of 16.
# (A mask's last stride is specialised for: it is 1, and 16 bytes are loaded at once.)
_GROWING = ["keys", "splits", "entries"]
_MASK_STRIDES = ["mask_stride_batch", "mask_stride_head", "mask_stride_query"]


@triton.jit(do_not_specialize=_GROWING + _MASK_STRIDES)
def decode_split_kernel(
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
    """Write t_C, m_C and w_C of one split: shapes as in `run`, strides in elements.

    partial: the results, [pair, row, split] entries of WIDTH, 1 and 1 numbers, one kind after the
    other. MASK: 0 none, 1 bool, 2 additive. SHARED_MASK: it is the same for all rows of a program.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    # Programs that read the same keys are neighbours.
    program = tl.program_id(0)
    row_block = program % row_blocks
    split = (program // row_blocks) % splits
    pair = program // (row_blocks * splits)
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    rows = queries * GROUP
    row = row_block * ROWS + tl.arange(0, ROWS)
    row_live = row < rows
    token = (row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM
    factor = tl.cast(scale, tl.float32)
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
    # Query token i of Tq sees the keys u <= i + Tk - Tq.
    last_seen = token + (keys - queries)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    first = split * split_keys
    for start in range(first, tl.minimum(first + split_keys, keys), KEYS):
        u = (start + lane).to(tl.int64)
        # seen: keys that a row of this program sees. No others are read: a cache's unused end
        # costs no traffic, and what lies there is of no account.
        seen = u < keys
        visible = row_live[:, None] & seen[None, :]
        bias = tl.zeros([1, KEYS], tl.float32)
        if CAUSAL:
            visible &= u[None, :] <= last_seen[:, None]
        if MASK != 0:
            if SHARED_MASK:
                entry = mask_start + kv_head * GROUP * mask_stride_head + u * mask_stride_key
                if MASK == 1:
                    seen &= tl.load(entry, mask=seen, other=0).to(tl.int1)
                else:
                    read = _added(tl.load(entry, mask=seen, other=float("-inf")))
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
        z = _product(q, tl.trans(k), EMULATED) * factor
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
        total = total * shrink[:, None] + _product(p.to(v.dtype), v, EMULATED)
        maximum = new_maximum

    # A row that saw nothing: 0 times what other rows' keys hold, which need not be finite.
    total = tl.where((weight == 0.0)[:, None], 0.0, total)
    index = (pair.to(tl.int64) * rows + row) * splits + split
    total_rows = tl.multiple_of(partial + index * WIDTH, [16])
    tl.store(total_rows[:, None] + dim[None, :], total, mask=query_live)
    maximum_start = partial + tl.cast(entries, tl.int64) * WIDTH
    tl.store(maximum_start + index, maximum, mask=row_live)
    tl.store(maximum_start + entries + index, weight, mask=row_live)


@triton.jit(do_not_specialize=["slots", "splits", "entries"])
def decode_merge_kernel(
    query,
    partial,
    out,
    lse,
    key,
    value,
    table,
    slots,
    queries,
    kv_heads,
    splits,
    entries,
    scale,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    out_stride_batch,
    out_stride_head,
    out_stride_token,
    lse_stride_batch,
    lse_stride_head,
    lse_stride_token,
    key_stride_slot,
    key_stride_batch,
    key_stride_head,
    key_stride_token,
    value_stride_slot,
    value_stride_batch,
    value_stride_head,
    value_stride_token,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
):
    """Write out and lse of one row; shapes as in `run`, strides in elements.

    A program a row, not a (batch, key/value head): few tokens make few programs, and a token's
    slots, which the rows of one group read again, are little beside the keys. Products of one row
    are sums in float32, without padding to a tensor core's 16 rows. Tiles have a first axis of the
    one token, as `slot_rows` gives them.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    rows = queries * GROUP
    row = program % rows
    pair = program // rows
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    token = (row // GROUP + tl.arange(0, 1)).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM

    maximum = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    total = tl.zeros([1, PADDED_DIM], tl.float32)
    index = program.to(tl.int64) * splits
    maximum_start = partial + tl.cast(entries, tl.int64) * WIDTH
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        live = split < splits
        entry = index + split
        m = tl.load(maximum_start + entry, mask=live, other=float("-inf"))[None, :]
        w = tl.load(maximum_start + entries + entry, mask=live, other=0.0)[None, :]
        load_live = live[:, None] & dim_live[None, :]
        total_rows = tl.multiple_of(partial + entry * WIDTH, [16])
        t = tl.load(total_rows[:, None] + dim[None, :], mask=load_live, other=0.0)[None, :, :]
        new_maximum = tl.maximum(maximum, tl.max(m, 1))
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = tl.exp2((maximum - pivot) * LOG2E)
        p = tl.exp2((m - pivot[:, None]) * LOG2E)
        weight = weight * shrink + tl.sum(w * p, 1)
        total = total * shrink[:, None] + tl.sum(t * p[:, :, None], 1)
        maximum = new_maximum

    if HAS_SLOTS:
        query_row = query + batch * query_stride_batch + head * query_stride_head
        query_row = tl.multiple_of(query_row + token * query_stride_token, [ALIGN])
        q = tl.load(query_row[:, None] + dim[None, :], mask=dim_live[None, :], other=0.0)
        q = q.to(tl.float32) * tl.cast(scale, tl.float32)
        for first in range(0, slots, SLOTS):
            slot = (first + tl.arange(0, SLOTS)).to(tl.int64)
            slot_live = slot < slots
            slot_load = (slot_live[:, None] & dim_live[None, :])[None, :, :]
            key_rows = slot_rows(
                key, table, slot, slot_live, batch, kv_head, token, key_stride_slot,
                key_stride_batch, key_stride_head, key_stride_token, 0, COLUMNS, TABLE,
                UNIFORM, SLOT_ALIGN,
            )  # fmt: skip
            value_rows = slot_rows(
                value, table, slot, slot_live, batch, kv_head, token, value_stride_slot,
                value_stride_batch, value_stride_head, value_stride_token, 4, COLUMNS, TABLE,
                UNIFORM, SLOT_ALIGN,
            )  # fmt: skip
            k = tl.load(key_rows[:, :, None] + dim[None, None, :], mask=slot_load, other=0.0)
            v = tl.load(value_rows[:, :, None] + dim[None, None, :], mask=slot_load, other=0.0)
            z = tl.sum(k.to(tl.float32) * q[:, None, :], 2)
            z = tl.where(slot_live[None, :], z, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(z, 1))
            shrink = tl.exp2((maximum - new_maximum) * LOG2E)
            p = tl.exp2((z - new_maximum[:, None]) * LOG2E)
            weight = weight * shrink + tl.sum(p, 1)
            total = total * shrink[:, None] + tl.sum(v.to(tl.float32) * p[:, :, None], 1)
            maximum = new_maximum

    # Without slots a row may have seen nothing at all: its out is 0 and its lse -inf.
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    out_row = out + batch * out_stride_batch + head * out_stride_head
    out_row = tl.multiple_of(out_row + token * out_stride_token, [ALIGN])
    tl.store(
        out_row[:, None] + dim[None, :], total.to(out.dtype.element_ty), mask=dim_live[None, :]
    )
    lse_row = lse + batch * lse_stride_batch + head * lse_stride_head + token * lse_stride_token
    tl.store(lse_row, maximum + tl.log2(weight) * LN2)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: slot_table.Slots | None,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of few query tokens over the keys and the depth slots.

    Args:
        q: queries [B, Hq, Tq, d], meant for up to
            `kernels.MAX_DECODE_QUERIES` tokens.
        k, v: keys and values [B, Hk, Tk, d], any strides, Hq a multiple of Hk; Tk may be 0.
        slots: the depth slots, each [B, Hk, Tq, d] (see `slot_table`), or None.
        is_causal: query token i sees the keys u <= i + Tk - Tq.
        scale: factor of every score.
        mask: of the sequence, bool or additive, broadcastable to [B, Hq, Tq, Tk]; beside is_causal
            it takes more away. Keys that no row of a program sees are not read at all.
        splits: the most splits of the keys; by default what `configs.decode_splits` says.

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
    kind, shared = NO_MASK, True
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        if mask.dtype not in _MASK_DTYPES:  # float8
            mask = mask.to(torch.float32)
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
        mask_strides = mask.expand(b, hq, queries, keys).stride()
        one_head = group == 1 or _is(mask_strides[1], 0)
        shared = one_head and (_is(queries, 1) or _is(mask_strides[2], 0))

    rows = group * queries
    tile = configs.decode_tile(
        head_dim=d, rows=rows, dtype=q.dtype, capability=launch.capability(q)
    )
    row_blocks = -(-rows // tile.rows)
    parts = configs.decode_splits(
        pairs=b * hk * row_blocks,
        keys=keys,
        tile_keys=tile.keys,
        multiprocessors=_multiprocessors(q),
    )
    if splits is not None:
        parts = configs.equal_splits(count=splits, keys=keys, tile_keys=tile.keys)
    width = -(-d // _ROW_ELEMENTS) * _ROW_ELEMENTS
    # t_C, then m_C, then w_C: [B, Hk, rows, splits] entries of width, 1 and 1 numbers.
    entries = b * hk * rows * parts.count
    partial = q.new_empty((entries * (width + 2),), dtype=torch.float32)
    traced = launch.is_traced(q) if slots is None else slots.traced
    joining = configs.merge_tile(head_dim=d, slots=0 if slots is None else slots.count)
    with launch.on_device(q):
        launch.launchable(decode_split_kernel, traced)[(b * hk * parts.count * row_blocks,)](
            q,
            k,
            v,
            q if mask is None else mask,
            partial,
            queries,
            keys,
            hk,
            row_blocks,
            parts.count,
            entries,
            parts.keys,
            scale,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *mask_strides,
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=configs.padded(d),
            WIDTH=width,
            ROWS=tile.rows,
            KEYS=tile.keys,
            CAUSAL=is_causal,
            MASK=kind,
            SHARED_MASK=shared,
            ALIGN=launch.alignment(q),
            KEY_ALIGN=launch.alignment(k),
            VALUE_ALIGN=launch.alignment(v),
            EMULATED=launch.EMULATED,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        launch.launchable(decode_merge_kernel, traced)[(b * hk * rows,)](
            q,
            partial,
            out,
            lse,
            *_slot_tensors(slots, q),
            queries,
            hk,
            parts.count,
            entries,
            scale,
            *q.stride()[:3],
            *out.stride()[:3],
            *lse.stride(),
            *((0,) * 8 if slots is None else (*slots.key_strides, *slots.value_strides)),
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=configs.padded(d),
            WIDTH=width,
            SPLITS=joining.splits,
            SLOTS=joining.slots,
            HAS_SLOTS=slots is not None,
            COLUMNS=tiles.TABLE_COLUMNS,
            TABLE=slots is not None and slots.is_table,
            UNIFORM=slots is None or slots.is_uniform,
            ALIGN=launch.alignment(q, out),
            SLOT_ALIGN=16 if slots is None else slots.align,
            num_warps=joining.warps,
        )
    return out, lse


def _slot_tensors(slots: slot_table.Slots | None, q: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """key, value, table and count of the slots; without slots tensors that are never read."""
    return (q, q, q, 0) if slots is None else (slots.key, slots.value, slots.table, slots.count)


def _is(n: Any, number: int) -> bool:
    """n is known to be this number: no guard on a symbolic one."""
    return type(n) is int and n == number


def _multiprocessors(x: Tensor) -> int:
    if x.is_cuda and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
    return _MULTIPROCESSORS
