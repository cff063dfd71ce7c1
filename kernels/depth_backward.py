"""Backward of the depth part: gradients of the query and of every slot, from the joint softmax.

Source: arXiv 2603.15619, section 3. With the JOINT lse and delta = do . o of a query,

    p = exp(z - lse);  dz = p (do . v - delta);  dq += scale sum_slots dz k
    dk = scale sum_heads dz q;  dv = sum_heads p do

and no token touches another's slots, so each gradient row is written by exactly one program:
no atomics, and the same bits every time. dq starts from the sequence part's.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import configs, launch, slot_table, tiles
from moda_compile.kernels.depth_backward_vector import depth_backward_vector_kernel
from moda_compile.kernels.tiles import (
    ask_for,
    ask_for_sides,
    batched_dot,
    group_heads,
    head_rows,
    load_columns,
    load_rows,
    program_rows,
    repeat_heads,
    row_offsets,
    slot_rows,
)


@triton.jit
def depth_backward_kernel(
    query,
    out,
    grad_out,
    sequence_grad_query,
    grad_query,
    lse,
    delta_out,
    key,
    value,
    table,
    grad_key,
    grad_value,
    slots,
    tokens,
    kv_heads,
    scale,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    out_stride_batch,
    out_stride_head,
    out_stride_token,
    grad_out_stride_batch,
    grad_out_stride_head,
    grad_out_stride_token,
    sequence_stride_batch,
    sequence_stride_head,
    sequence_stride_token,
    grad_query_stride_batch,
    grad_query_stride_head,
    grad_query_stride_token,
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
    grad_stride_slot,
    grad_stride_batch,
    grad_stride_head,
    grad_stride_token,
    grad_stride_dim,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    ASK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Write grad_query and delta_out, or (GRADIENTS) grad_query and write or (ACCUMULATE) add to
    grad_key and grad_value; see `run`.

    HEADS, ASK: as for `depth_forward_kernel`. PADDED_GROUP: GROUP, padded to what a product's rows
    and its inner side take.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, kv_head, token, row_live = program_rows(tokens, kv_heads, ROWS)
    query_strides = (query_stride_batch, query_stride_head, query_stride_token)
    out_strides = (out_stride_batch, out_stride_head, out_stride_token)
    grad_out_strides = (grad_out_stride_batch, grad_out_stride_head, grad_out_stride_token)
    sequence_strides = (sequence_stride_batch, sequence_stride_head, sequence_stride_token)
    grad_query_strides = (grad_query_stride_batch, grad_query_stride_head, grad_query_stride_token)
    lse_strides = (lse_stride_batch, lse_stride_head, lse_stride_token)
    key_strides = (key_stride_slot, key_stride_batch, key_stride_head, key_stride_token)
    value_strides = (value_stride_slot, value_stride_batch, value_stride_head, value_stride_token)
    head, head_live = group_heads(kv_head, row_live, GROUP, PADDED_GROUP)
    column_head, column_live = group_heads(kv_head, row_live, GROUP, HEADS)
    dim = tl.arange(0, PADDED_DIM)
    factor = tl.cast(scale, tl.float32)

    dim_live = dim < HEAD_DIM

    lse_rows = lse + row_offsets(batch, column_head, token[:, None], lse_strides)
    lse_log2 = tl.load(lse_rows, mask=column_live, other=0.0) * LOG2E
    at_rows = batch, head, head_live, token, dim, dim_live
    q = load_rows(query, *at_rows, query_strides, ALIGN)
    do = load_rows(grad_out, *at_rows, grad_out_strides, ALIGN)
    if HEADS < PADDED_GROUP:
        at_columns = batch, column_head, column_live, token, dim, dim_live
        q_columns = load_columns(query, *at_columns, query_strides, ALIGN)
        do_columns = load_columns(grad_out, *at_columns, grad_out_strides, ALIGN)
        o_columns = load_columns(out, *at_columns, out_strides, ALIGN)
    else:
        o = load_rows(out, *at_rows, out_strides, ALIGN)
        q_columns = tl.permute(q, (0, 2, 1))
        do_columns = tl.permute(do, (0, 2, 1))
        o_columns = tl.permute(o, (0, 2, 1))
    if ASK:
        # As forward; sequence_grad_query is read when everything else is done.
        ask_for_sides(
            key, value, table, slots, batch, kv_head, token, row_live, key_strides, value_strides,
            SLOTS, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
        sequence_rows = head_rows(sequence_grad_query, batch, head, token, sequence_strides, ALIGN)
        ask_for(sequence_rows, head_live, HEAD_DIM, PADDED_DIM)
    delta = tl.sum(do_columns.to(tl.float32) * o_columns.to(tl.float32), 1)  # [row, head]
    if not GRADIENTS:
        delta_rows = (batch * kv_heads * GROUP + column_head) * tokens + token[:, None]
        tl.store(delta_out + delta_rows, delta, mask=column_live)
    dq = tl.zeros([ROWS, PADDED_GROUP, PADDED_DIM], tl.float32)

    for first in range(0, slots, SLOTS):
        slot = (first + tl.arange(0, SLOTS)).to(tl.int64)
        slot_live = slot < slots
        slots_live = row_live[:, None] & slot_live[None, :]
        load_live = slots_live[:, :, None] & dim_live[None, None, :]
        key_rows = slot_rows(
            key, table, slot, slot_live, batch, kv_head, token, key_strides,
            0, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        k = tl.load(key_rows[:, :, None] + dim[None, None, :], mask=load_live, other=0.0)
        value_rows = slot_rows(
            value, table, slot, slot_live, batch, kv_head, token, value_strides,
            4, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        v = tl.load(value_rows[:, :, None] + dim[None, None, :], mask=load_live, other=0.0)
        z = batched_dot(k, q_columns, EMULATED) * (factor * LOG2E)  # [row, slot, head]
        p = tl.exp2(z - lse_log2[:, None, :])
        # A slot past the last has z = 0, so its p may overflow; it must not reach dq as inf * 0.
        p = tl.where(slots_live[:, :, None], p, 0.0)
        dp = batched_dot(v, do_columns, EMULATED)
        # The factor `scale` enters after the products, so that dz stays in float16's range.
        dz = repeat_heads((p * (dp - delta[:, None, :])).to(q.dtype), PADDED_GROUP)
        dq += batched_dot(tl.permute(dz, (0, 2, 1)), k, EMULATED)
        if GRADIENTS:
            grad_rows = (
                batch * grad_stride_batch
                + kv_head[:, None] * grad_stride_head
                + slot[None, :] * grad_stride_slot
                + token[:, None] * grad_stride_token
            )
            # A side is stored before the next one's product: only one of them is in registers.
            dk = batched_dot(dz, q, EMULATED) * factor
            grad_key_rows = tl.multiple_of(grad_key + grad_rows, [GRAD_ALIGN, GRAD_ALIGN])
            key_cells = grad_key_rows[:, :, None] + dim[None, None, :] * grad_stride_dim
            if ACCUMULATE:
                dk += tl.load(key_cells, mask=load_live, other=0.0).to(tl.float32)
            tl.store(key_cells, dk.to(grad_key.dtype.element_ty), mask=load_live)
            dv = batched_dot(repeat_heads(p.to(q.dtype), PADDED_GROUP), do, EMULATED)
            grad_value_rows = tl.multiple_of(grad_value + grad_rows, [GRAD_ALIGN, GRAD_ALIGN])
            value_cells = grad_value_rows[:, :, None] + dim[None, None, :] * grad_stride_dim
            if ACCUMULATE:
                dv += tl.load(value_cells, mask=load_live, other=0.0).to(tl.float32)
            tl.store(value_cells, dv.to(grad_value.dtype.element_ty), mask=load_live)

    sequence = load_rows(sequence_grad_query, *at_rows, sequence_strides, ALIGN)
    dq = sequence.to(tl.float32) + dq * factor
    grad_query_rows = head_rows(grad_query, batch, head, token, grad_query_strides, ALIGN)
    cells_live = head_live[:, :, None] & dim_live[None, None, :]
    cells = grad_query_rows[:, :, None] + dim[None, None, :]
    tl.store(cells, dq.to(grad_query.dtype.element_ty), mask=cells_live)


def run(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    sequence_grad_query: Tensor,
    slots: slot_table.Slots,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    *,
    accumulate: bool,
    scale: float,
    products: configs.Products | None = None,
    tile: configs.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the depth part.

    Args:
        grad_out, q, out, sequence_grad_query: [B, Hq, T, d], last stride 1; out is the joint
            output, sequence_grad_query the sequence part of the query's gradient.
        lse: joint log-sum-exp [B, Hq, T], natural log, float32.
        slots: the S depth slots.
        grad_key, grad_value: [N >= S, B, Hk, T, d], any strides, the same for both; rows i < S are
            overwritten or, with accumulate, added to. No other row is touched. Or None for both:
            the slots' gradients are left to `depth_gather`.
        scale: factor of every score.
        products, tile: as for `depth_forward.run`.

    Returns:
        the query's whole gradient [B, Hq, T, d], in [B, T, Hq, d] memory order; without grad_key
        also delta [B, Hq, T], float32, contiguous.
    """
    b, hq, t, d = q.shape
    hk = slots.kv_heads
    group = hq // hk
    grad_query = launch.token_major_empty(q, q.shape)
    align = launch.alignment(q, out, grad_out, sequence_grad_query, grad_query)
    delta = None
    if grad_key is None or grad_value is None:
        delta = q.new_empty((b, hq, t), dtype=torch.float32)
        grad_key = grad_value = q  # never touched
        grad_strides: tuple[int, ...] = (0,) * 5
    else:
        grad_strides = grad_key.stride()
    grad_align = launch.alignment(grad_key, grad_value)
    slot_align = slots.align
    # Only a vector kernel makes a table of slots itself.
    many = delta is not None and not slots.named and slots.count >= configs.MANY_QUERY
    products = products or configs.products(head_dim=d, group=group, dtype=q.dtype, many=many)
    kernel: Any = depth_backward_vector_kernel
    if products == "vector":
        # Tiles of equal accesses, in elements, lie in the same threads.
        size, grad_size = q.element_size(), grad_key.element_size()
        width = min(slot_align // size, grad_align // grad_size)
        slot_align, grad_align = width * size, width * grad_size
        choose_tile: Any = configs.vector_query_tile
        if delta is None:
            choose_tile = partial(configs.vector_backward_tile, accumulate=accumulate)
        tile = tile or choose_tile(
            head_dim=d, group=group, dtype=q.dtype, width=width, capability=launch.capability(q)
        )
        own: dict[str, Any] = dict(
            STAGES=tile.stages,
            COPIES=tiles.TABLE_COPIES,
            ALIGN=min(align, slot_align),
        )
        own |= slot_table.names(slots, "n")
    else:
        kernel = depth_backward_kernel
        choose_tile = partial(configs.backward_tile, accumulate=accumulate)
        if delta is not None:
            choose_tile = partial(configs.query_tile, table=slots.is_table)
        tile = tile or choose_tile(
            head_dim=d, group=group, dtype=q.dtype, capability=launch.capability(q)
        )
        own = dict(
            HEADS=configs.product_heads(group),
            PADDED_GROUP=configs.padded(group),
            ALIGN=align,
            ASK=launch.asks(),
            EMULATED=launch.EMULATED,
            num_stages=tile.stages,
        )
    with launch.on_device(q):
        launch.launchable(kernel, slots.traced, tile.registers)[(tile.programs(b, t, hk),)](
            q,
            out,
            grad_out,
            sequence_grad_query,
            grad_query,
            lse,
            lse if delta is None else delta,
            slots.key,
            slots.value,
            slots.table,
            grad_key,
            grad_value,
            slots.count,
            t,
            hk,
            scale,
            *q.stride()[:3],
            *out.stride()[:3],
            *grad_out.stride()[:3],
            *sequence_grad_query.stride()[:3],
            *grad_query.stride()[:3],
            *lse.stride(),
            *slots.key_strides,
            *slots.value_strides,
            *grad_strides,
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=configs.padded(d),
            ROWS=tile.rows,
            SLOTS=tile.slots,
            COLUMNS=tiles.TABLE_COLUMNS,
            TABLE=slots.is_table,
            UNIFORM=slots.is_uniform,
            GRADIENTS=delta is None,
            ACCUMULATE=accumulate and delta is None,
            SLOT_ALIGN=slot_align,
            GRAD_ALIGN=grad_align,
            num_warps=tile.warps,
            **own,
        )
    return grad_query, delta
