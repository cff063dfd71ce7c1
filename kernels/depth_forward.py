"""Forward of the depth part: merge a token's depth slots into its sequence attention.

Source: arXiv 2603.15619, section 3 (one joint softmax over the sequence and the depth slots). The
sequence part arrives normalised, with the log-sum-exp of its scores, so it enters the online
softmax as one more key: score lse_seq, value out_seq. A program handles ROWS rows of one (token,
key/value head) each and all query heads that share it, so every slot is read exactly once.
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
from moda_compile.kernels.depth_forward_vector import depth_forward_vector_kernel
from moda_compile.kernels.tiles import (
    ask_for_sides,
    batched_dot,
    group_heads,
    head_rows,
    load_columns,
    program_rows,
    row_offsets,
    slot_rows,
)


@triton.jit
def depth_forward_kernel(
    query,
    sequence_out,
    sequence_lse,
    out,
    lse,
    key,
    value,
    table,
    slots,
    tokens,
    kv_heads,
    scale,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    sequence_stride_batch,
    sequence_stride_head,
    sequence_stride_token,
    sequence_lse_stride_batch,
    sequence_lse_stride_head,
    sequence_lse_stride_token,
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
    ASK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Write out and lse of the joint softmax; shapes as in `run`, strides in elements.

    HEADS: GROUP, padded to what a product's columns take.
    ASK: the first slots are asked for as a program begins (`tiles.ask_for`).
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, kv_head, token, row_live = program_rows(tokens, kv_heads, ROWS)
    query_strides = (query_stride_batch, query_stride_head, query_stride_token)
    sequence_strides = (sequence_stride_batch, sequence_stride_head, sequence_stride_token)
    sequence_lse_strides = (
        sequence_lse_stride_batch,
        sequence_lse_stride_head,
        sequence_lse_stride_token,
    )
    out_strides = (out_stride_batch, out_stride_head, out_stride_token)
    lse_strides = (lse_stride_batch, lse_stride_head, lse_stride_token)
    key_strides = (key_stride_slot, key_stride_batch, key_stride_head, key_stride_token)
    value_strides = (value_stride_slot, value_stride_batch, value_stride_head, value_stride_token)
    head, head_live = group_heads(kv_head, row_live, GROUP, HEADS)
    dim = tl.arange(0, PADDED_DIM)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E

    dim_live = dim < HEAD_DIM

    lse_rows = sequence_lse + row_offsets(batch, head, token[:, None], sequence_lse_strides)
    # Online softmax in base 2: running maximum, sum of 2^(z - maximum), and weighted values.
    # The sequence part is the first element: z = lse_seq, weight 1, value out_seq.
    maximum = tl.load(lse_rows, mask=head_live, other=0.0) * LOG2E
    weight = tl.full([ROWS, HEADS], 1.0, tl.float32)
    at_columns = batch, head, head_live, token, dim, dim_live
    total = load_columns(sequence_out, *at_columns, sequence_strides, ALIGN)
    q = load_columns(query, *at_columns, query_strides, ALIGN)
    if ASK:
        # These loads are waited for before the loop, which would ask for the first slots then.
        ask_for_sides(
            key, value, table, slots, batch, kv_head, token, row_live, key_strides, value_strides,
            SLOTS, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    total = total.to(tl.float32)

    for first in range(0, slots, SLOTS):
        slot = (first + tl.arange(0, SLOTS)).to(tl.int64)
        slot_live = slot < slots
        slots_live = row_live[:, None] & slot_live[None, :]
        load_live = slots_live[:, :, None] & dim_live[None, None, :]
        values_live = slots_live[:, None, :] & dim_live[None, :, None]
        key_rows = slot_rows(
            key, table, slot, slot_live, batch, kv_head, token, key_strides,
            0, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        k = tl.load(key_rows[:, :, None] + dim[None, None, :], mask=load_live, other=0.0)
        value_rows = slot_rows(
            value, table, slot, slot_live, batch, kv_head, token, value_strides,
            4, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        # As the product takes it: what it would take permuted is not copied to shared memory ahead.
        v = tl.load(value_rows[:, None, :] + dim[None, :, None], mask=values_live, other=0.0)
        z = batched_dot(k, q, EMULATED) * scale_log2  # [row, slot, head]
        z = tl.where(slot_live[None, :, None], z, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(z, 1))
        shrink = tl.exp2(maximum - new_maximum)
        p = tl.exp2(z - new_maximum[:, None, :])
        weight = weight * shrink + tl.sum(p, 1)
        total = total * shrink[:, None, :]
        total += batched_dot(v, p.to(v.dtype), EMULATED)
        maximum = new_maximum

    total = total / weight[:, None, :]
    out_rows = head_rows(out, batch, head, token, out_strides, ALIGN)
    cells_live = head_live[:, None, :] & dim_live[None, :, None]
    cells = out_rows[:, None, :] + dim[None, :, None]
    tl.store(cells, total.to(out.dtype.element_ty), mask=cells_live)
    joint_rows = lse + row_offsets(batch, head, token[:, None], lse_strides)
    tl.store(joint_rows, (maximum + tl.log2(weight)) * LN2, mask=head_live)


def run(
    q: Tensor,
    sequence_out: Tensor,
    sequence_lse: Tensor,
    slots: slot_table.Slots,
    scale: float,
    *,
    products: configs.Products | None = None,
    tile: configs.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the depth slots into a partial attention result.

    Args:
        q: queries [B, Hq, T, d], last stride 1.
        sequence_out: normalised sequence part [B, Hq, T, d], last stride 1.
        sequence_lse: log-sum-exp of its scores [B, Hq, T], natural log, float32.
        slots: the depth slots, stacked or as a table (see `slot_table`).
        scale: factor of every score.
        products: "matrix" for the kernel above, "vector" for that of `depth_forward_vector`; by
            default what `configs.products` says.
        tile: by default what `configs` says.

    Returns:
        out [B, Hq, T, d] in [B, T, Hq, d] memory order and lse [B, Hq, T], float32, natural log.
    """
    b, hq, t, d = q.shape
    hk = slots.kv_heads
    group = hq // hk
    out = launch.token_major_empty(q, q.shape)
    lse = q.new_empty((b, hq, t), dtype=torch.float32)
    align = launch.alignment(q, sequence_out, out)
    # Only a vector kernel makes a table of slots itself.
    many = not slots.named and slots.count >= configs.MANY_FORWARD
    products = products or configs.products(head_dim=d, group=group, dtype=q.dtype, many=many)
    kernel: Any = depth_forward_vector_kernel
    if products == "vector":
        width = slots.align // q.element_size()
        tile = tile or configs.vector_forward_tile(
            head_dim=d, group=group, dtype=q.dtype, width=width, capability=launch.capability(q)
        )
        # Tiles of equal accesses lie in the same threads.
        own: dict[str, Any] = dict(
            STAGES=tile.stages,
            COPIES=tiles.TABLE_COPIES,
            ALIGN=min(align, slots.align),
        )
        own |= slot_table.names(slots, "n")
    else:
        kernel = depth_forward_kernel
        tile = tile or configs.forward_tile(
            head_dim=d,
            group=group,
            dtype=q.dtype,
            capability=launch.capability(q),
            table=slots.is_table,
        )
        own = dict(
            HEADS=configs.product_heads(group),
            ALIGN=align,
            ASK=launch.asks(),
            EMULATED=launch.EMULATED,
            num_stages=tile.stages,
        )
    with launch.on_device(q):
        launch.launchable(kernel, slots.traced, tile.registers)[(tile.programs(b, t, hk),)](
            q,
            sequence_out,
            sequence_lse,
            out,
            lse,
            slots.key,
            slots.value,
            slots.table,
            slots.count,
            t,
            hk,
            scale,
            *q.stride()[:3],
            *sequence_out.stride()[:3],
            *sequence_lse.stride(),
            *out.stride()[:3],
            *lse.stride(),
            *slots.key_strides,
            *slots.value_strides,
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=configs.padded(d),
            ROWS=tile.rows,
            SLOTS=tile.slots,
            COLUMNS=tiles.TABLE_COLUMNS,
            TABLE=slots.is_table,
            UNIFORM=slots.is_uniform,
            SLOT_ALIGN=slots.align,
            num_warps=tile.warps,
            **own,
        )
    return out, lse
