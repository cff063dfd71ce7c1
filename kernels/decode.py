"""Attention of a few query tokens over many keys and the depth slots: decoding with a KV cache.

Two launches. With rows r = (query token, query head) of one (batch, key/value head), and z as in
the README's equation, the first has one program for each part C: a split of the keys, or a chunk of
a token's slots. It writes, unscaled,

    m_C[r] = max z[u],   w_C[r] = sum exp(z[u] - m_C),   t_C[r] = sum exp(z[u] - m_C) v[u],  u in C

and the second, a program a row, joins them:

    m = max m_C,   out = sum_C exp(m_C - m) t_C / sum_C exp(m_C - m) w_C

m_C and w_C are kept apart, not as one log-sum-exp: beside a maximum of -2^100, which a row of keys
all masked by huge numbers has (see `masks`), log(w_C) would be lost, and with it how many keys a
split stands for. No atomics: the same inputs give the same bits.

A step of decoding is a chain of kernels that each take microseconds, so what counts beside the
traffic is how many wait for one another: the slots are read beside the keys, not behind them, and
a few slots are passed as addresses, not in a table that a kernel would have to write first. What a
mask leaves is known in front (`visible`). On Hopper each kernel is launched while the one before it
ends, and has its first keys on their way by then. And where batches and heads alone fill the GPU
there is one launch: a program has all chunks and all keys of its rows, and nothing to join.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moda_compile.kernels import MASK_CHUNK, decode_configs, launch, slot_table, tiles, visible
from moda_compile.kernels.configs import padded
from moda_compile.kernels.decode_merge import decode_merge_kernel
from moda_compile.kernels.decode_parts import ask_for_keys, slot_tile, with_keys, with_slots

NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2
_ROW_ELEMENTS = 4  # rows of partial results start on 16-byte boundaries

# What changes with every token must not compile the kernels anew when it becomes a multiple of 16,
# nor must an address. (A mask's last stride is specialised for: its entries lie side by side.)
_GROWING = ["keys", "splits", "entries", "slots", "chunks", "slot_programs", "mask_chunks"]
_MASK_STRIDES = ["mask_stride_batch", "mask_stride_head", "mask_stride_query"]
_MASK_STRIDES += ["ranges_stride_batch", "ranges_stride_head"]
_ADDRESSES = [f"{side}{i}" for side in ("k", "v") for i in range(slot_table.ROWS)]


@triton.jit(do_not_specialize=_GROWING + _MASK_STRIDES + _ADDRESSES)
def decode_split_kernel(
    query,
    key,
    value,
    mask,
    ranges,
    partial,
    out,
    lse,
    slot_key,
    slot_value,
    table,
    queries,
    keys,
    slots,
    kv_heads,
    row_blocks,
    splits,
    chunks,
    slot_programs,
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
    ranges_stride_batch,
    ranges_stride_head,
    mask_chunks,
    out_stride_batch,
    out_stride_head,
    out_stride_token,
    lse_stride_batch,
    lse_stride_head,
    lse_stride_token,
    slot_key_stride_slot,
    slot_key_stride_batch,
    slot_key_stride_head,
    slot_key_stride_token,
    slot_value_stride_slot,
    slot_value_stride_batch,
    slot_value_stride_head,
    slot_value_stride_token,
    k0, k1, k2, k3, k4, k5, k6, k7,
    k8, k9, k10, k11, k12, k13, k14, k15,
    k16, k17, k18, k19, k20, k21, k22, k23,
    k24, k25, k26, k27, k28, k29, k30, k31,
    v0, v1, v2, v3, v4, v5, v6, v7,
    v8, v9, v10, v11, v12, v13, v14, v15,
    v16, v17, v18, v19, v20, v21, v22, v23,
    v24, v25, v26, v27, v28, v29, v30, v31,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SLOTS: tl.constexpr,
    WHOLE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    MASK_CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    LISTED: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Write t_C, m_C and w_C of one part, or, where a program has all there is for its rows
    (WHOLE), out and lse: shapes as in `run`, strides in elements.

    slot_programs of the programs have a chunk of SLOTS slots of one token, `chunks` to a token, and
    up to ROWS query heads of one key/value head; the others a split of the keys, and ROWS rows.
    partial: the results, [pair, row, part] entries of WIDTH, 1 and 1 numbers, one kind after the
    other; a row's parts are its splits, then its chunks. MASK: 0 none, 1 bool, 2 additive.
    SHARED_MASK: it is the same for all rows of a program, and `ranges` is what `visible.run` says
    of it, in mask_chunks chunks. LISTED: k0, v0, .. are the addresses of the slots. DEPENDENT:
    launched while the kernels before it may still run.
    """
    LN2: tl.constexpr = 0.6931471805599453
    if DEPENDENT:
        gdc_launch_dependents()
    rows = queries * GROUP
    place = tl.program_id(0)
    # Of this program: chunks [chunk, last_chunk) of a token's slots; keys [first, last).
    if WHOLE:
        pair = place
        part = 0
        token = 0
        row_start = 0
        row_end = rows
        chunk = 0
        last_chunk = chunks
        first = 0
        last = keys
    else:
        # Slots are read in a moment that is all latency. Between the splits they cost next to
        # nothing; all together in front they would keep every SM from its keys.
        turn = tl.num_programs(0) // tl.maximum(slot_programs, 1)
        program = place // turn
        if (place % turn == 0) & (program < slot_programs):
            blocks = tl.cdiv(GROUP, ROWS)
            chunk = program % chunks
            last_chunk = chunk + 1
            part = splits + chunk
            token = (program // (chunks * blocks)) % queries
            pair = program // (chunks * blocks * queries)
            row_start = token * GROUP + (program // chunks) % blocks * ROWS
            row_end = token * GROUP + GROUP
            first = 0
            last = 0
        else:
            # Programs that read the same keys are neighbours.
            program = place - tl.minimum(program + 1, slot_programs)
            chunk = 0
            last_chunk = 0
            part = (program // row_blocks) % splits
            token = 0
            pair = program // (row_blocks * splits)
            row_start = program % row_blocks * ROWS
            row_end = rows
            first = part * split_keys
            last = tl.minimum(first + split_keys, keys)
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    row = row_start + tl.arange(0, ROWS)
    row_live = row < row_end
    head = kv_head * GROUP + row % GROUP
    row_token = (row // GROUP).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    live = row_live[:, None] & (dim < HEAD_DIM)[None, :]
    query_rows = query + batch * query_stride_batch
    query_rows += head * query_stride_head + row_token * query_stride_token
    query_rows = tl.multiple_of(query_rows, [ALIGN])
    if DEPENDENT:
        # While the kernels before it end the first keys are on their way.
        start = key + batch * key_stride_batch + kv_head * key_stride_head
        ask_for_keys(start, first, last, key_stride_token, HEAD_DIM, PADDED_DIM, KEYS)
        start = value + batch * value_stride_batch + kv_head * value_stride_head
        ask_for_keys(start, first, last, value_stride_token, HEAD_DIM, PADDED_DIM, KEYS)
        gdc_wait()
    q = tl.load(query_rows[:, None] + dim[None, :], mask=live, other=0.0)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    # The first chunk is on its way while the keys are read, and used behind them.
    slot = chunk * SLOTS + tl.arange(0, SLOTS)
    k_slots = tl.zeros([SLOTS, PADDED_DIM], slot_key.dtype.element_ty)
    v_slots = tl.zeros([SLOTS, PADDED_DIM], slot_value.dtype.element_ty)
    if chunk < last_chunk:
        k_slots = slot_tile(
            slot, batch, kv_head, token, slot_key, table, slots, slot_key_stride_slot,
            slot_key_stride_batch, slot_key_stride_head, slot_key_stride_token,
            k0, k1, k2, k3, k4, k5, k6, k7,
            k8, k9, k10, k11, k12, k13, k14, k15,
            k16, k17, k18, k19, k20, k21, k22, k23,
            k24, k25, k26, k27, k28, k29, k30, k31,
            0, HEAD_DIM, PADDED_DIM, SLOTS, COLUMNS, TABLE, LISTED, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        v_slots = slot_tile(
            slot, batch, kv_head, token, slot_value, table, slots, slot_value_stride_slot,
            slot_value_stride_batch, slot_value_stride_head, slot_value_stride_token,
            v0, v1, v2, v3, v4, v5, v6, v7,
            v8, v9, v10, v11, v12, v13, v14, v15,
            v16, v17, v18, v19, v20, v21, v22, v23,
            v24, v25, v26, v27, v28, v29, v30, v31,
            4, HEAD_DIM, PADDED_DIM, SLOTS, COLUMNS, TABLE, LISTED, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
    maximum, weight, total = with_keys(
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
        GROUP,
        HEAD_DIM,
        PADDED_DIM,
        KEYS,
        CAUSAL,
        MASK,
        SHARED_MASK,
        MASK_CHUNK,
        KEY_ALIGN,
        VALUE_ALIGN,
        EMULATED,
    )
    # A row that saw no key: 0 times what other rows' keys hold, which need not be finite.
    total = tl.where((weight == 0.0)[:, None], 0.0, total)
    if chunk < last_chunk:
        maximum, weight, total = with_slots(
            maximum, weight, total, q, k_slots, v_slots, slot < slots, scale, EMULATED
        )
    for c in tl.range(chunk + 1, last_chunk, num_stages=1):
        slot = c * SLOTS + tl.arange(0, SLOTS)
        k_slots = slot_tile(
            slot, batch, kv_head, token, slot_key, table, slots, slot_key_stride_slot,
            slot_key_stride_batch, slot_key_stride_head, slot_key_stride_token,
            k0, k1, k2, k3, k4, k5, k6, k7,
            k8, k9, k10, k11, k12, k13, k14, k15,
            k16, k17, k18, k19, k20, k21, k22, k23,
            k24, k25, k26, k27, k28, k29, k30, k31,
            0, HEAD_DIM, PADDED_DIM, SLOTS, COLUMNS, TABLE, LISTED, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        v_slots = slot_tile(
            slot, batch, kv_head, token, slot_value, table, slots, slot_value_stride_slot,
            slot_value_stride_batch, slot_value_stride_head, slot_value_stride_token,
            v0, v1, v2, v3, v4, v5, v6, v7,
            v8, v9, v10, v11, v12, v13, v14, v15,
            v16, v17, v18, v19, v20, v21, v22, v23,
            v24, v25, v26, v27, v28, v29, v30, v31,
            4, HEAD_DIM, PADDED_DIM, SLOTS, COLUMNS, TABLE, LISTED, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        maximum, weight, total = with_slots(
            maximum, weight, total, q, k_slots, v_slots, slot < slots, scale, EMULATED
        )

    if WHOLE:
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
        out_rows = out + batch * out_stride_batch
        out_rows += head * out_stride_head + row_token * out_stride_token
        out_rows = tl.multiple_of(out_rows, [OUT_ALIGN])
        tl.store(out_rows[:, None] + dim[None, :], total.to(out.dtype.element_ty), mask=live)
        lse_rows = lse + batch * lse_stride_batch
        lse_rows += head * lse_stride_head + row_token * lse_stride_token
        tl.store(lse_rows, maximum + tl.log2(weight) * LN2, mask=row_live)
    else:
        maximum_start = partial + tl.cast(entries, tl.int64) * WIDTH
        index = (pair.to(tl.int64) * rows + row) * (splits + chunks) + part
        total_rows = tl.multiple_of(partial + index * WIDTH, [16])
        tl.store(total_rows[:, None] + dim[None, :], total, mask=live)
        tl.store(maximum_start + index, maximum, mask=row_live)
        tl.store(maximum_start + entries + index, weight, mask=row_live)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: slot_table.Slots | None,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of few query tokens over the keys and the depth slots.

    Args:
        q: queries [B, Hq, Tq, d], meant for up to `kernels.MAX_DECODE_QUERIES` tokens.
        k, v: keys and values [B, Hk, Tk, d], any strides, Hq a multiple of Hk; Tk may be 0.
        slots: the depth slots, each [B, Hk, Tq, d] (see `slot_table`), best `listed`; or None.
        is_causal: query token i sees the keys u <= i + Tk - Tq.
        scale: factor of every score.
        mask: of the sequence, bool or additive, broadcastable to [B, Hq, Tq, Tk]; beside is_causal
            it takes more away. Keys that no row of a program sees are not read at all.
        seen: what `visible.run` says of the mask, where it is known.
        splits: the most splits of the keys; by default what `decode_configs.decode_splits` says.

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
    kind = NO_MASK
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    seen_strides: tuple[int, ...] = (0, 0)
    if mask is not None:
        mask = visible.readable(mask)
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
        mask_strides = mask.expand(b, hq, queries, keys).stride()
        if seen is None:
            distinct = visible.distinct_rows(mask, group, queries)
            seen = None if distinct is None else visible.run(mask, *distinct)
        if seen is not None:
            seen_strides = seen.expand(b, hk, seen.shape[2]).stride()[:2]

    rows = group * queries
    multiprocessors = launch.multiprocessors(q)
    tile = decode_configs.decode_tile(
        head_dim=d,
        rows=rows,
        keys=keys,
        pairs=b * hk,
        dtype=q.dtype,
        capability=launch.capability(q),
        multiprocessors=multiprocessors,
    )
    row_blocks = -(-rows // tile.rows)
    if splits is None:
        splits = decode_configs.decode_splits(
            pairs=b * hk * row_blocks, tile=tile, multiprocessors=multiprocessors
        )
    split = decode_configs.equal_splits(count=splits, keys=keys, tile_keys=tile.keys)
    slot_tile = decode_configs.decode_slots(head_dim=d, dtype=q.dtype)
    read = slots or slot_table.none(q)
    chunks = -(-read.count // slot_tile)
    # One program for all there is: nothing is left to join.
    whole = launch.equals(splits, 1) and launch.equals(queries, 1) and launch.equals(row_blocks, 1)
    slot_programs = 0 if whole else b * hk * queries * -(-group // tile.rows) * chunks
    width = -(-d // _ROW_ELEMENTS) * _ROW_ELEMENTS
    # t_C, then m_C, then w_C: [B, Hk, rows, parts] entries of width, 1 and 1 numbers.
    parts = split.count + chunks
    entries = 0 if whole else b * hk * rows * parts
    partial = q.new_empty((entries * (width + 2),), dtype=torch.float32)
    traced = launch.is_traced(q) if slots is None else slots.traced
    # PyTorch's way to launch a traced kernel knows of no dependent launches.
    dependent = not traced and launch.dependent_launches(q)
    options = {"launch_pdl": True} if dependent else {}
    joining = decode_configs.merge_tile(head_dim=d, parts=splits + chunks)
    with launch.on_device(q):
        launch.launchable(decode_split_kernel, traced)[
            (b * hk if whole else slot_programs + b * hk * split.count * row_blocks,)
        ](
            q,
            k,
            v,
            q if mask is None else mask,
            q if seen is None else seen,
            partial,
            out,
            lse,
            read.key,
            read.value,
            read.table,
            queries,
            keys,
            read.count,
            hk,
            row_blocks,
            split.count,
            chunks,
            slot_programs,
            entries,
            split.keys,
            scale,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *mask_strides,
            *seen_strides,
            0 if seen is None else seen.shape[2] // 3,
            *out.stride()[:3],
            *lse.stride(),
            *read.key_strides,
            *read.value_strides,
            *(read.addresses or (0,) * (2 * slot_table.ROWS)),
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=padded(d),
            WIDTH=width,
            ROWS=tile.rows,
            KEYS=tile.keys,
            SLOTS=slot_tile,
            WHOLE=whole,
            DEPENDENT=dependent,
            CAUSAL=is_causal,
            MASK=kind,
            SHARED_MASK=seen is not None,
            MASK_CHUNK=MASK_CHUNK,
            COLUMNS=tiles.TABLE_COLUMNS,
            TABLE=read.is_table,
            LISTED=bool(read.addresses),
            UNIFORM=read.is_uniform,
            ALIGN=launch.alignment(q),
            KEY_ALIGN=launch.alignment(k),
            VALUE_ALIGN=launch.alignment(v),
            SLOT_ALIGN=read.align,
            OUT_ALIGN=launch.alignment(out),
            EMULATED=launch.EMULATED,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **options,
        )
        if whole:
            return out, lse
        launch.launchable(decode_merge_kernel, traced)[(b * hk * rows,)](
            partial,
            out,
            lse,
            queries,
            hk,
            parts,
            entries,
            *out.stride()[:3],
            *lse.stride(),
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=padded(d),
            WIDTH=width,
            PARTS=joining.parts,
            DEPENDENT=dependent,
            ALIGN=launch.alignment(out),
            num_warps=joining.warps,
            **options,
        )
    return out, lse
