"""Gradients of depth slots, gathered from all their readers at once.

`depth_backward` adds a layer's share to the gradient of every slot that the layer reads: for each
pair of a layer and a slot it reads the gradient so far and writes it back. Once the backward passes
of all readers have run, the same sums can be taken the other way round,

    p_r = exp(z_r - lse_r);  dz_r = p_r (do_r . v - delta_r)
    dk = scale sum_r sum_heads dz_r q_r;  dv = sum_r sum_heads p_r do_r

over the readers r of a slot (k, v), in registers: a program reads q and do of every reader once,
for several slots together, and writes each gradient once, rounded once. The tiles are those of
`depth_forward_vector`: small groups only, as larger ones have more q and do to read than there are
gradients.
"""

# The arguments of Triton functions have no Python types, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import configs, launch, slot_table, tiles
from moda_compile.kernels.tiles import (
    load_slots,
    program_rows,
    row_cells,
    row_offsets,
    slot_start,
)


@triton.jit
def _load_heads(
    base, table, first, readers, batch, kv_head, token, dim, live, strides,
    COLUMN: tl.constexpr, READERS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    UNIFORM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The rows of READERS readers from `first` on, head by head: a tuple of [row, head_dim]."""
    held = ()
    for place in tl.static_range(READERS):
        for member in tl.static_range(GROUP):
            head = kv_head * GROUP + member
            held += load_slots(
                base, table, first + place, readers, batch, head, token, dim, live, strides,
                COLUMN, 1, COLUMNS, True, UNIFORM, ALIGN,
            )  # fmt: skip
    return held


@triton.jit
def _load_numbers(
    base, table, first, readers, batch, kv_head, token, row_live, strides,
    COLUMN: tl.constexpr, READERS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """As `_load_heads`, of tensors with one number a row: a tuple of [row]."""
    held = ()
    for place in tl.static_range(READERS):
        reader = tl.cast(first + place, tl.int64)
        live = reader < readers
        start, stride_batch, stride_head, stride_token = slot_start(
            base, table, reader, live, strides[0], strides[1], strides[2], strides[3],
            COLUMN, COLUMNS, True, UNIFORM,
        )  # fmt: skip
        own = (stride_batch, stride_head, stride_token)
        for member in tl.static_range(GROUP):
            entries = start + row_offsets(batch, kv_head * GROUP + member, token, own)
            held += (tl.load(entries, mask=row_live & live, other=0.0),)
    return held


@triton.jit
def depth_gather_kernel(
    query,
    grad_out,
    lse,
    delta,
    rows_table,
    numbers_table,
    keys,
    values,
    gradients,
    coded_readers,
    tokens,
    kv_heads,
    scale,
    query_strides,
    grad_out_strides,
    lse_strides,
    delta_strides,
    key_strides,
    value_strides,
    gradient_strides,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    READERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_UNIFORM: tl.constexpr,
    NUMBERS_UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
):
    """Write gradients [slot, (key, value), batch, kv_head, token, head_dim]; see `run`.

    keys, values, key_strides, value_strides, coded_readers: tuples of SLOTS, the strides (batch,
    head, token), the readers as `_coded` makes them. gradient_strides: (slot, side, batch, head,
    token). rows_table: of each reader's query and grad_out; numbers_table: of its lse and delta;
    query, grad_out, lse, delta only lend their element types.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, kv_head, token, row_live = program_rows(tokens, kv_heads, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    live = row_live[:, None] & (dim < HEAD_DIM)[None, :]
    factor = tl.cast(scale, tl.float32)
    readers, most = (), 0
    for place in tl.static_range(SLOTS):
        readers += (coded_readers[place] // 2 - 1,)
        most = tl.maximum(most, readers[place])

    k, v, dk, dv = (), (), (), ()
    for place in tl.static_range(SLOTS):
        cells = row_cells(keys[place], batch, kv_head, token, dim, key_strides[place], ALIGN)
        k += (tl.load(cells, mask=live, other=0.0),)
        cells = row_cells(values[place], batch, kv_head, token, dim, value_strides[place], ALIGN)
        v += (tl.load(cells, mask=live, other=0.0),)
        dk += (tl.zeros([ROWS, PADDED_DIM], tl.float32),)
        dv += (tl.zeros([ROWS, PADDED_DIM], tl.float32),)

    # Readers are loaded while those before them are worked on; see the forward kernel.
    q = _load_heads(
        query, rows_table, 0, most, batch, kv_head, token, dim, live, query_strides,
        0, READERS, GROUP, COLUMNS, ROWS_UNIFORM, ALIGN,
    )  # fmt: skip
    do = _load_heads(
        grad_out, rows_table, 0, most, batch, kv_head, token, dim, live, grad_out_strides,
        4, READERS, GROUP, COLUMNS, ROWS_UNIFORM, ALIGN,
    )  # fmt: skip
    own_lse = _load_numbers(
        lse, numbers_table, 0, most, batch, kv_head, token, row_live, lse_strides,
        0, READERS, GROUP, COLUMNS, NUMBERS_UNIFORM,
    )  # fmt: skip
    own_delta = _load_numbers(
        delta, numbers_table, 0, most, batch, kv_head, token, row_live, delta_strides,
        4, READERS, GROUP, COLUMNS, NUMBERS_UNIFORM,
    )  # fmt: skip
    for first in range(0, most, READERS):
        coming_q = _load_heads(
            query, rows_table, first + READERS, most, batch, kv_head, token, dim, live,
            query_strides, 0, READERS, GROUP, COLUMNS, ROWS_UNIFORM, ALIGN,
        )  # fmt: skip
        coming_do = _load_heads(
            grad_out, rows_table, first + READERS, most, batch, kv_head, token, dim, live,
            grad_out_strides, 4, READERS, GROUP, COLUMNS, ROWS_UNIFORM, ALIGN,
        )  # fmt: skip
        coming_lse = _load_numbers(
            lse, numbers_table, first + READERS, most, batch, kv_head, token, row_live,
            lse_strides, 0, READERS, GROUP, COLUMNS, NUMBERS_UNIFORM,
        )  # fmt: skip
        coming_delta = _load_numbers(
            delta, numbers_table, first + READERS, most, batch, kv_head, token, row_live,
            delta_strides, 4, READERS, GROUP, COLUMNS, NUMBERS_UNIFORM,
        )  # fmt: skip
        new_dk, new_dv = (), ()
        for place in tl.static_range(SLOTS):
            wide_k, wide_v = k[place].to(tl.float32), v[place].to(tl.float32)
            sum_k, sum_v = dk[place], dv[place]
            for row in tl.static_range(READERS * GROUP):
                wide_q, wide_do = q[row].to(tl.float32), do[row].to(tl.float32)
                z = tl.sum(wide_k * wide_q, 1) * factor
                p = tl.exp2((z - own_lse[row]) * LOG2E)
                # Of what is no reader of this slot, p is bounded by nothing.
                p = tl.where(first + row // GROUP < readers[place], p, 0.0)
                dz = p * (tl.sum(wide_v * wide_do, 1) - own_delta[row])
                sum_k += dz[:, None] * wide_q
                sum_v += p[:, None] * wide_do
            new_dk += (sum_k,)
            new_dv += (sum_v,)
        dk, dv = new_dk, new_dv
        q, do, own_lse, own_delta = coming_q, coming_do, coming_lse, coming_delta

    strides = (gradient_strides[2], gradient_strides[3], gradient_strides[4])
    for place in tl.static_range(SLOTS):
        start = gradients + place * gradient_strides[0]
        cells = row_cells(start, batch, kv_head, token, dim, strides, GRAD_ALIGN)
        tl.store(cells, (dk[place] * factor).to(gradients.dtype.element_ty), mask=live)
        start += gradient_strides[1]
        cells = row_cells(start, batch, kv_head, token, dim, strides, GRAD_ALIGN)
        tl.store(cells, dv[place].to(gradients.dtype.element_ty), mask=live)


def _coded(readers: int) -> int:
    """A number that Triton compiles no kernel of its own for: neither 1 nor a multiple of 16.

    In a tuple do_not_specialize does not count.
    """
    return 2 * readers + 3


def run(
    grad_outs: Sequence[Tensor],
    queries: Sequence[Tensor],
    lses: Sequence[Tensor],
    deltas: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    readers: Sequence[int],
    *,
    scale: float,
    dtype: torch.dtype,
    tile: configs.Tile | None = None,
) -> Tensor:
    """The whole gradients of some slots.

    Args:
        grad_outs, queries: of R >= 1 readers, each [B, Hq, T, d] of one dtype, any strides.
        lses, deltas: of the same, each [B, Hq, T], float32: the joint log-sum-exp (natural log),
            and delta = do . o of the joint output, as `depth_backward.run` returns it.
        keys, values: of M >= 1 slots, each [B, Hk, T, d], any strides.
        readers: for each slot, how many of the readers read it: the first ones.
        scale: factor of every score.
        dtype: of the result.
        tile: tokens is its rows, slots its readers a step; by default what `configs` says.

    Returns:
        gradients [M, 2, B, Hk, T, d] of the slots' (keys, values), token-major in memory.
    """
    b, hk, t, d = keys[0].shape
    group = queries[0].shape[1] // hk
    keys, values = [[launch.unit_rows(x) for x in side] for side in (keys, values)]
    rows = slot_table.table(queries, grad_outs)
    numbers = slot_table.table(lses, deltas)
    gradients = keys[0].new_empty((len(keys), 2, b, t, hk, d), dtype=dtype).transpose(3, 4)
    # Tiles of equal accesses, in elements, lie in the same threads.
    size = keys[0].element_size()
    width = min(
        launch.alignment(*keys, *values) // size,
        rows.align // size,
        launch.alignment(gradients) // gradients.element_size(),
    )
    tile = tile or configs.gather_tile(head_dim=d, group=group, width=width)
    with launch.on_device(keys[0]):
        launch.launchable(depth_gather_kernel)[(b * -(-t * hk // tile.tokens),)](
            rows.key,
            rows.value,
            numbers.key,
            numbers.value,
            rows.table,
            numbers.table,
            tuple(keys),
            tuple(values),
            gradients,
            tuple(_coded(count) for count in readers),
            t,
            hk,
            scale,
            rows.key_strides,
            rows.value_strides,
            numbers.key_strides,
            numbers.value_strides,
            tuple(x.stride()[:3] for x in keys),
            tuple(x.stride()[:3] for x in values),
            gradients.stride()[:5],
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=configs.padded(d),
            ROWS=tile.tokens,
            SLOTS=len(keys),
            READERS=tile.slots,
            COLUMNS=tiles.TABLE_COLUMNS,
            ROWS_UNIFORM=rows.is_uniform,
            NUMBERS_UNIFORM=numbers.is_uniform,
            ALIGN=width * size,
            GRAD_ALIGN=width * gradients.element_size(),
            num_warps=tile.warps,
        )
    return gradients
