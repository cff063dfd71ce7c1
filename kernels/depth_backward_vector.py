"""Backward of the depth part for small groups: `depth_backward` without tensor cores.

The formulas of `depth_backward`, in the tiles of `depth_forward_vector`: a thread has the same
elements of every query, key, value and gradient row, so but for the two sums of a score no value
changes threads. Launched by `depth_backward.run`.
"""

# The arguments of Triton functions have no Python types, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from moda_compile.kernels.tiles import load_sides, program_rows, row_cells, row_offsets, write_table


@triton.jit
def _gradient_cells(
    base, slot, batch, head, token, dim, stride_slot, strides, stride_dim, ALIGN: tl.constexpr
):
    """Addresses [row, head_dim] of a slot's gradient base[slot, batch, head, token, dim]."""
    rows = base + slot * stride_slot + row_offsets(batch, head, token, strides)
    return tl.multiple_of(rows, [ALIGN])[:, None] + (dim * stride_dim)[None, :]


@triton.jit
def _load_gradients(
    base, first, slots, batch, head, token, dim, live, stride_slot, strides, stride_dim,
    SLOTS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What a gradient holds for SLOTS slots from `first` on: a tuple of tiles [row, head_dim]."""
    held = ()
    for place in tl.static_range(SLOTS):
        slot = tl.cast(first + place, tl.int64)
        cells = _gradient_cells(
            base, slot, batch, head, token, dim, stride_slot, strides, stride_dim, ALIGN
        )
        held += (tl.load(cells, mask=live & (slot < slots), other=0.0),)
    return held


# Each layer has another number of slots, and all launch the same kernel.
@triton.jit(do_not_specialize=["slots"])
def depth_backward_vector_kernel(
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
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIES: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
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
):  # fmt: skip
    """Write grad_query and delta_out, or (GRADIENTS) grad_query and write or (ACCUMULATE) add to
    grad_key and grad_value; arguments as of `depth_backward_kernel`.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    AHEAD: tl.constexpr = STAGES == 2
    if n0 is not None:
        table = write_table(
            table, COLUMNS, COPIES,
            n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15,
            n16, n17, n18, n19, n20, n21, n22, n23, n24, n25, n26, n27, n28, n29, n30, n31,
            n32, n33, n34, n35, n36, n37, n38, n39, n40, n41, n42, n43, n44, n45, n46, n47,
            n48, n49, n50, n51, n52, n53, n54, n55, n56, n57, n58, n59, n60, n61, n62, n63,
            n64, n65, n66, n67, n68, n69, n70, n71, n72, n73, n74, n75, n76, n77, n78, n79,
            n80, n81, n82, n83, n84, n85, n86, n87, n88, n89, n90, n91, n92, n93, n94, n95,
        )  # fmt: skip
    batch, kv_head, token, row_live = program_rows(tokens, kv_heads, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    live = row_live[:, None] & (dim < HEAD_DIM)[None, :]
    factor = tl.cast(scale, tl.float32)
    query_strides = (query_stride_batch, query_stride_head, query_stride_token)
    out_strides = (out_stride_batch, out_stride_head, out_stride_token)
    grad_out_strides = (grad_out_stride_batch, grad_out_stride_head, grad_out_stride_token)
    sequence_strides = (sequence_stride_batch, sequence_stride_head, sequence_stride_token)
    grad_query_strides = (grad_query_stride_batch, grad_query_stride_head, grad_query_stride_token)
    lse_strides = (lse_stride_batch, lse_stride_head, lse_stride_token)
    key_strides = (key_stride_slot, key_stride_batch, key_stride_head, key_stride_token)
    value_strides = (value_stride_slot, value_stride_batch, value_stride_head, value_stride_token)
    grad_strides = (grad_stride_batch, grad_stride_head, grad_stride_token)

    # q carries the factor of the scores, in base 2; of dk it is the gradient's, but for LN2.
    q, do, dq, delta, lse_log2 = (), (), (), (), ()
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        cells = row_cells(query, batch, head, token, dim, query_strides, ALIGN)
        q += (tl.load(cells, mask=live, other=0.0).to(tl.float32) * (factor * LOG2E),)
        cells = row_cells(grad_out, batch, head, token, dim, grad_out_strides, ALIGN)
        grad = tl.load(cells, mask=live, other=0.0).to(tl.float32)
        cells = row_cells(out, batch, head, token, dim, out_strides, ALIGN)
        o = tl.load(cells, mask=live, other=0.0).to(tl.float32)
        do += (grad,)
        delta += (tl.sum(grad * o, 1),)
        entries = lse + row_offsets(batch, head, token, lse_strides)
        lse_log2 += (tl.load(entries, mask=row_live, other=0.0) * LOG2E,)
        dq += (tl.zeros([ROWS, PADDED_DIM], tl.float32),)
        if not GRADIENTS:
            tl.store(
                delta_out + (batch * kv_heads * GROUP + head) * tokens + token,
                delta[member],
                mask=row_live,
            )

    # Loads as in the forward kernel.
    if AHEAD:
        k, v = load_sides(
            key, value, table, 0, slots, batch, kv_head, token, dim, live, key_strides,
            value_strides, SLOTS, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
    if AHEAD and ACCUMULATE:
        held_k = _load_gradients(
            grad_key, 0, slots, batch, kv_head, token, dim, live, grad_stride_slot,
            grad_strides, grad_stride_dim, SLOTS, GRAD_ALIGN,
        )  # fmt: skip
        held_v = _load_gradients(
            grad_value, 0, slots, batch, kv_head, token, dim, live, grad_stride_slot,
            grad_strides, grad_stride_dim, SLOTS, GRAD_ALIGN,
        )  # fmt: skip
    for first in tl.range(0, slots, SLOTS, num_stages=1 if AHEAD else STAGES):
        coming = first + SLOTS if AHEAD else first
        coming_k, coming_v = load_sides(
            key, value, table, coming, slots, batch, kv_head, token, dim, live, key_strides,
            value_strides, SLOTS, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        if ACCUMULATE:
            coming_held_k = _load_gradients(
                grad_key, coming, slots, batch, kv_head, token, dim, live, grad_stride_slot,
                grad_strides, grad_stride_dim, SLOTS, GRAD_ALIGN,
            )  # fmt: skip
            coming_held_v = _load_gradients(
                grad_value, coming, slots, batch, kv_head, token, dim, live, grad_stride_slot,
                grad_strides, grad_stride_dim, SLOTS, GRAD_ALIGN,
            )  # fmt: skip
        if not AHEAD:
            k, v = coming_k, coming_v
            if ACCUMULATE:
                held_k, held_v = coming_held_k, coming_held_v
        for place in tl.static_range(SLOTS):
            slot = tl.cast(first + place, tl.int64)
            slot_live = slot < slots
            wide_k, wide_v = k[place].to(tl.float32), v[place].to(tl.float32)
            dk = tl.zeros([ROWS, PADDED_DIM], tl.float32)
            dv = tl.zeros([ROWS, PADDED_DIM], tl.float32)
            new_dq = ()
            for member in tl.static_range(GROUP):
                p = tl.exp2(tl.sum(wide_k * q[member], 1) - lse_log2[member])
                # A slot past the last has z = 0, so its p may overflow; it must not reach dq as
                # inf * 0.
                p = tl.where(slot_live, p, 0.0)
                dz = p * (tl.sum(wide_v * do[member], 1) - delta[member])
                new_dq += (dq[member] + dz[:, None] * wide_k,)
                if GRADIENTS:
                    dk += dz[:, None] * q[member]
                    dv += p[:, None] * do[member]
            dq = new_dq
            if ACCUMULATE:
                dk = dk * LN2 + held_k[place].to(tl.float32)
                dv += held_v[place].to(tl.float32)
            elif GRADIENTS:
                dk = dk * LN2
            if GRADIENTS:
                key_cells = _gradient_cells(
                    grad_key, slot, batch, kv_head, token, dim, grad_stride_slot, grad_strides,
                    grad_stride_dim, GRAD_ALIGN,
                )  # fmt: skip
                tl.store(key_cells, dk.to(grad_key.dtype.element_ty), mask=live & slot_live)
                value_cells = _gradient_cells(
                    grad_value, slot, batch, kv_head, token, dim, grad_stride_slot, grad_strides,
                    grad_stride_dim, GRAD_ALIGN,
                )  # fmt: skip
                tl.store(value_cells, dv.to(grad_value.dtype.element_ty), mask=live & slot_live)
        if AHEAD:
            k, v = coming_k, coming_v
            if ACCUMULATE:
                held_k, held_v = coming_held_k, coming_held_v

    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        cells = row_cells(sequence_grad_query, batch, head, token, dim, sequence_strides, ALIGN)
        whole = tl.load(cells, mask=live, other=0.0).to(tl.float32) + dq[member] * factor
        cells = row_cells(grad_query, batch, head, token, dim, grad_query_strides, ALIGN)
        tl.store(cells, whole.to(grad_query.dtype.element_ty), mask=live)
