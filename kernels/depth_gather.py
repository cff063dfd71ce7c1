"""Gradients of depth slots, gathered from all their readers at once.

`depth_backward` adds a layer's share to the gradient of every slot that the layer reads: for each
pair of a layer and a slot it reads the gradient so far and writes it back. Once the backward passes
of all readers have run, the same sums can be taken the other way round,

    p_r = exp(z_r - lse_r);  dz_r = p_r (do_r . v - delta_r)
    dk = scale sum_r sum_heads dz_r q_r;  dv = sum_r sum_heads p_r do_r

over the readers r of a slot (k, v), in registers: a program reads q and do of every reader once,
for several slots together, and writes each gradient once, rounded once. The sums of slots that have
readers left may come along: they are written as they are, in float32 and dk without its scale, and
the launch that completes them starts from there. The tiles are those of `depth_forward_vector`:
small groups only, as larger ones have more q and do to read than there are gradients.
"""

# The arguments of Triton functions have no Python types, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.gathered import MOST_SLOTS
from moda_compile.kernels import configs, launch, slot_table, tiles
from moda_compile.kernels.tiles import (
    load_slots,
    program_rows,
    row_cells,
    row_offsets,
    slot_start,
    write_table,
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


# How many read a slot is another number in each layer.
_READERS = [f"{place}_readers" for place in ("first", "second", "third", "fourth")]


@triton.jit(do_not_specialize=_READERS)
def depth_gather_kernel(
    query,
    grad_out,
    lse,
    delta,
    rows_table,
    numbers_table,
    first_key, second_key, third_key, fourth_key,
    first_value, second_value, third_value, fourth_value,
    gradients,
    sums,
    partials,
    first_key_start, second_key_start, third_key_start, fourth_key_start,
    first_value_start, second_value_start, third_value_start, fourth_value_start,
    first_readers, second_readers, third_readers, fourth_readers,
    tokens,
    kv_heads,
    scale,
    query_stride_batch, query_stride_head, query_stride_token,
    grad_out_stride_batch, grad_out_stride_head, grad_out_stride_token,
    lse_stride_batch, lse_stride_head, lse_stride_token,
    delta_stride_batch, delta_stride_head, delta_stride_token,
    first_key_stride_batch, first_key_stride_head, first_key_stride_token,
    second_key_stride_batch, second_key_stride_head, second_key_stride_token,
    third_key_stride_batch, third_key_stride_head, third_key_stride_token,
    fourth_key_stride_batch, fourth_key_stride_head, fourth_key_stride_token,
    first_value_stride_batch, first_value_stride_head, first_value_stride_token,
    second_value_stride_batch, second_value_stride_head, second_value_stride_token,
    third_value_stride_batch, third_value_stride_head, third_value_stride_token,
    fourth_value_stride_batch, fourth_value_stride_head, fourth_value_stride_token,
    gradient_stride_slot,
    gradient_stride_side,
    gradient_stride_batch,
    gradient_stride_head,
    gradient_stride_token,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    UNFINISHED: tl.constexpr,
    READERS: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS_UNIFORM: tl.constexpr,
    NUMBERS_UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    SUM_ALIGN: tl.constexpr,
    n0=None, n1=None, n2=None, n3=None, n4=None, n5=None, n6=None, n7=None,
    n8=None, n9=None, n10=None, n11=None, n12=None, n13=None, n14=None, n15=None,
    n16=None, n17=None, n18=None, n19=None, n20=None, n21=None, n22=None, n23=None,
    n24=None, n25=None, n26=None, n27=None, n28=None, n29=None, n30=None, n31=None,
    n32=None, n33=None, n34=None, n35=None, n36=None, n37=None, n38=None, n39=None,
    n40=None, n41=None, n42=None, n43=None, n44=None, n45=None, n46=None, n47=None,
    n48=None, n49=None, n50=None, n51=None, n52=None, n53=None, n54=None, n55=None,
    n56=None, n57=None, n58=None, n59=None, n60=None, n61=None, n62=None, n63=None,
    n64=None, n65=None, n66=None, n67=None, n68=None, n69=None, n70=None, n71=None,
    n72=None, n73=None, n74=None, n75=None, n76=None, n77=None, n78=None, n79=None,
    n80=None, n81=None, n82=None, n83=None, n84=None, n85=None, n86=None, n87=None,
    n88=None, n89=None, n90=None, n91=None, n92=None, n93=None, n94=None, n95=None,
    m0=None, m1=None, m2=None, m3=None, m4=None, m5=None, m6=None, m7=None,
    m8=None, m9=None, m10=None, m11=None, m12=None, m13=None, m14=None, m15=None,
    m16=None, m17=None, m18=None, m19=None, m20=None, m21=None, m22=None, m23=None,
    m24=None, m25=None, m26=None, m27=None, m28=None, m29=None, m30=None, m31=None,
    m32=None, m33=None, m34=None, m35=None, m36=None, m37=None, m38=None, m39=None,
    m40=None, m41=None, m42=None, m43=None, m44=None, m45=None, m46=None, m47=None,
    m48=None, m49=None, m50=None, m51=None, m52=None, m53=None, m54=None, m55=None,
    m56=None, m57=None, m58=None, m59=None, m60=None, m61=None, m62=None, m63=None,
    m64=None, m65=None, m66=None, m67=None, m68=None, m69=None, m70=None, m71=None,
    m72=None, m73=None, m74=None, m75=None, m76=None, m77=None, m78=None, m79=None,
    m80=None, m81=None, m82=None, m83=None, m84=None, m85=None, m86=None, m87=None,
    m88=None, m89=None, m90=None, m91=None, m92=None, m93=None, m94=None, m95=None,
):  # fmt: skip
    """Write gradients [slot, (key, value), batch, kv_head, token, head_dim]; see `run`.

    SLOTS: 1 to 4; the arguments of the others are never read. Of the last UNFINISHED the sums go to
    `sums`, float32; partials: sums of all SLOTS to start from, or None. Both lie as gradients do.
    first_key_start ..: what a gradient is added to, in its strides, or None. first_readers ..: how
    many of the readers read the slot. rows_table: of each reader's query and grad_out;
    numbers_table: of its lse and delta; query, grad_out, lse, delta only lend their element types.
    n0, n1, .. and m0, m1, ..: what the tables are of, where they have to be written.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    AHEAD: tl.constexpr = STAGES == 2
    keys = (first_key, second_key, third_key, fourth_key)
    values = (first_value, second_value, third_value, fourth_value)
    starts = (
        (first_key_start, first_value_start),
        (second_key_start, second_value_start),
        (third_key_start, third_value_start),
        (fourth_key_start, fourth_value_start),
    )
    counts = (first_readers, second_readers, third_readers, fourth_readers)
    query_strides = (0, query_stride_batch, query_stride_head, query_stride_token)
    grad_out_strides = (0, grad_out_stride_batch, grad_out_stride_head, grad_out_stride_token)
    lse_strides = (0, lse_stride_batch, lse_stride_head, lse_stride_token)
    delta_strides = (0, delta_stride_batch, delta_stride_head, delta_stride_token)
    key_strides = (
        (first_key_stride_batch, first_key_stride_head, first_key_stride_token),
        (second_key_stride_batch, second_key_stride_head, second_key_stride_token),
        (third_key_stride_batch, third_key_stride_head, third_key_stride_token),
        (fourth_key_stride_batch, fourth_key_stride_head, fourth_key_stride_token),
    )
    value_strides = (
        (first_value_stride_batch, first_value_stride_head, first_value_stride_token),
        (second_value_stride_batch, second_value_stride_head, second_value_stride_token),
        (third_value_stride_batch, third_value_stride_head, third_value_stride_token),
        (fourth_value_stride_batch, fourth_value_stride_head, fourth_value_stride_token),
    )
    if n0 is not None:
        rows_table = write_table(
            rows_table, COLUMNS, COPIES,
            n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15,
            n16, n17, n18, n19, n20, n21, n22, n23, n24, n25, n26, n27, n28, n29, n30, n31,
            n32, n33, n34, n35, n36, n37, n38, n39, n40, n41, n42, n43, n44, n45, n46, n47,
            n48, n49, n50, n51, n52, n53, n54, n55, n56, n57, n58, n59, n60, n61, n62, n63,
            n64, n65, n66, n67, n68, n69, n70, n71, n72, n73, n74, n75, n76, n77, n78, n79,
            n80, n81, n82, n83, n84, n85, n86, n87, n88, n89, n90, n91, n92, n93, n94, n95,
        )  # fmt: skip
    if m0 is not None:
        numbers_table = write_table(
            numbers_table, COLUMNS, COPIES,
            m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15,
            m16, m17, m18, m19, m20, m21, m22, m23, m24, m25, m26, m27, m28, m29, m30, m31,
            m32, m33, m34, m35, m36, m37, m38, m39, m40, m41, m42, m43, m44, m45, m46, m47,
            m48, m49, m50, m51, m52, m53, m54, m55, m56, m57, m58, m59, m60, m61, m62, m63,
            m64, m65, m66, m67, m68, m69, m70, m71, m72, m73, m74, m75, m76, m77, m78, m79,
            m80, m81, m82, m83, m84, m85, m86, m87, m88, m89, m90, m91, m92, m93, m94, m95,
        )  # fmt: skip
    batch, kv_head, token, row_live = program_rows(tokens, kv_heads, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    live = row_live[:, None] & (dim < HEAD_DIM)[None, :]
    factor = tl.cast(scale, tl.float32)
    readers, most = (), 0
    for place in tl.static_range(SLOTS):
        readers += (counts[place],)
        most = tl.maximum(most, counts[place])

    # What is made here, and what it starts from, lies alike.
    strides = (gradient_stride_batch, gradient_stride_head, gradient_stride_token)
    slot_stride = tl.cast(gradient_stride_slot, tl.int64)  # its multiples may need that
    k, v, dk, dv = (), (), (), ()
    for place in tl.static_range(SLOTS):
        cells = row_cells(keys[place], batch, kv_head, token, dim, key_strides[place], ALIGN)
        k += (tl.load(cells, mask=live, other=0.0),)
        cells = row_cells(values[place], batch, kv_head, token, dim, value_strides[place], ALIGN)
        v += (tl.load(cells, mask=live, other=0.0),)
        if partials is not None:
            own = partials + place * slot_stride
            cells = row_cells(own, batch, kv_head, token, dim, strides, SUM_ALIGN)
            dk += (tl.load(cells, mask=live, other=0.0),)
            own += gradient_stride_side
            cells = row_cells(own, batch, kv_head, token, dim, strides, SUM_ALIGN)
            dv += (tl.load(cells, mask=live, other=0.0),)
        else:
            dk += (tl.zeros([ROWS, PADDED_DIM], tl.float32),)
            dv += (tl.zeros([ROWS, PADDED_DIM], tl.float32),)

    # Loads as in the forward kernel, of readers.
    if AHEAD:
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
    for first in tl.range(0, most, READERS, num_stages=1 if AHEAD else STAGES):
        coming = first + READERS if AHEAD else first
        coming_q = _load_heads(
            query, rows_table, coming, most, batch, kv_head, token, dim, live, query_strides,
            0, READERS, GROUP, COLUMNS, ROWS_UNIFORM, ALIGN,
        )  # fmt: skip
        coming_do = _load_heads(
            grad_out, rows_table, coming, most, batch, kv_head, token, dim, live, grad_out_strides,
            4, READERS, GROUP, COLUMNS, ROWS_UNIFORM, ALIGN,
        )  # fmt: skip
        coming_lse = _load_numbers(
            lse, numbers_table, coming, most, batch, kv_head, token, row_live, lse_strides,
            0, READERS, GROUP, COLUMNS, NUMBERS_UNIFORM,
        )  # fmt: skip
        coming_delta = _load_numbers(
            delta, numbers_table, coming, most, batch, kv_head, token, row_live, delta_strides,
            4, READERS, GROUP, COLUMNS, NUMBERS_UNIFORM,
        )  # fmt: skip
        if not AHEAD:
            q, do, own_lse, own_delta = coming_q, coming_do, coming_lse, coming_delta
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
        if AHEAD:
            q, do, own_lse, own_delta = coming_q, coming_do, coming_lse, coming_delta

    for place in tl.static_range(SLOTS - UNFINISHED):
        whole = (dk[place] * factor, dv[place])
        for side in tl.static_range(2):
            grad = whole[side]
            if starts[place][side] is not None:
                cells = row_cells(
                    starts[place][side], batch, kv_head, token, dim, strides, GRAD_ALIGN
                )
                grad += tl.load(cells, mask=live, other=0.0).to(tl.float32)
            row = gradients + place * slot_stride + side * gradient_stride_side
            cells = row_cells(row, batch, kv_head, token, dim, strides, GRAD_ALIGN)
            tl.store(cells, grad.to(gradients.dtype.element_ty), mask=live)
    for place in tl.static_range(UNFINISHED):
        own = sums + place * slot_stride
        cells = row_cells(own, batch, kv_head, token, dim, strides, SUM_ALIGN)
        tl.store(cells, dk[SLOTS - UNFINISHED + place], mask=live)
        own += gradient_stride_side
        cells = row_cells(own, batch, kv_head, token, dim, strides, SUM_ALIGN)
        tl.store(cells, dv[SLOTS - UNFINISHED + place], mask=live)


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
    starts: Sequence[Tensor | None] = (),
    partials: Tensor | None = None,
    unfinished: int = 0,
    tile: configs.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole gradients of some slots, and sums of others that go on in another call.

    Args:
        grad_outs, queries: of R >= 1 readers, each [B, Hq, T, d] of one dtype, any strides.
        lses, deltas: of the same, each [B, Hq, T], float32: the joint log-sum-exp (natural log),
            and delta = do . o of the joint output, as `depth_backward.run` returns it.
        keys, values: of M slots, 1 to MOST_SLOTS, each [B, Hk, T, d], any strides.
        readers: for each slot, how many of the readers read it: the first ones.
        scale: factor of every score.
        dtype: of the gradients.
        starts: of each finished slot's key and value in turn, what its gradient is added to
            [B, Hk, T, d], of the gradients' dtype, or None; by default nothing for all.
        partials: [M, 2, B, Hk, T, d], float32, what the slots' sums start from: another call's
            sums; by default 0.
        unfinished: U < M, how many of the slots, the last ones, have readers elsewhere.
        tile: tokens is its rows, slots its readers a step; by default what `configs` says.

    Returns:
        gradients [M - U, 2, B, Hk, T, d] of the finished slots' (keys, values), and the sums
        [U, 2, B, Hk, T, d] of the others, float32, the keys' not yet multiplied by the scale; both
        token-major in memory.
    """
    (b, hk, t, d), finished = keys[0].shape, len(keys) - unfinished
    keys, values = [[launch.unit_rows(x) for x in side] for side in (keys, values)]
    rows = slot_table.separate(queries, grad_outs)
    numbers = slot_table.separate(lses, deltas)
    made = keys[0].new_empty((finished, 2, b, t, hk, d), dtype=dtype).transpose(3, 4)
    sums = keys[0].new_empty((unfinished, 2, b, t, hk, d), dtype=torch.float32).transpose(3, 4)
    starts = [None if x is None else launch.token_major(x) for x in starts or [None] * 2 * finished]
    if partials is not None:
        partials = launch.contiguous(partials.transpose(3, 4)).transpose(3, 4)
    # Tiles of equal accesses, in elements, lie in the same threads.
    widths = [rows.align // keys[0].element_size()]
    written = [made, sums] if unfinished else [made]
    widths += [
        launch.alignment(x) // x.element_size()
        for x in (*keys, *values, *written, *starts, partials)
        if x is not None
    ]
    group, width = queries[0].shape[1] // hk, min(widths)
    tile = tile or configs.gather_tile(
        head_dim=d,
        group=group,
        dtype=keys[0].dtype,
        width=width,
        capability=launch.capability(keys[0]),
        slots=len(keys),
    )
    # The kernel has arguments for MOST_SLOTS: the last slot again, never read.
    missing = MOST_SLOTS - len(keys)
    keys, values = [[*side, *side[-1:] * missing] for side in (keys, values)]
    counts = [*readers, *[readers[-1]] * missing]
    own_starts = [*starts, *[None] * 2 * (MOST_SLOTS - finished)]
    with launch.on_device(keys[0]):
        launch.launchable(depth_gather_kernel, rows.traced, tile.registers)[
            (tile.programs(b, t, hk),)
        ](
            rows.key,
            rows.value,
            numbers.key,
            numbers.value,
            rows.table,
            numbers.table,
            *keys,
            *values,
            made,
            sums if unfinished else None,
            partials,
            *own_starts[::2],
            *own_starts[1::2],
            *counts,
            t,
            hk,
            scale,
            *rows.key_strides[1:],
            *rows.value_strides[1:],
            *numbers.key_strides[1:],
            *numbers.value_strides[1:],
            *(stride for x in (*keys, *values) for stride in x.stride()[:3]),
            *made.stride()[:5],
            GROUP=group,
            HEAD_DIM=d,
            PADDED_DIM=configs.padded(d),
            ROWS=tile.rows,
            SLOTS=MOST_SLOTS - missing,
            UNFINISHED=unfinished,
            READERS=tile.slots,
            STAGES=tile.stages,
            COLUMNS=tiles.TABLE_COLUMNS,
            COPIES=tiles.TABLE_COPIES,
            ROWS_UNIFORM=rows.is_uniform,
            NUMBERS_UNIFORM=numbers.is_uniform,
            ALIGN=width * keys[0].element_size(),
            GRAD_ALIGN=width * made.element_size(),
            SUM_ALIGN=width * sums.element_size(),
            num_warps=tile.warps,
            **slot_table.names(rows, "n"),
            **slot_table.names(numbers, "m"),
        )
    return made, sums
