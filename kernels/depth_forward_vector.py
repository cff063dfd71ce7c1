"""Forward of the depth part for small groups: `depth_forward` without tensor cores.

A tensor-core product takes 8 or 16 query heads; where a key/value head has few of its own, most of
the product is padding, and its operands take the registers that loads on their way would need. Here
a program handles ROWS rows, one (token, key/value head) each, in tiles [row, head_dim] of which a
thread loads 16 bytes. A score is a sum over the few threads of a row; the slots of a step and the
query heads of the group are tuples, so no value changes threads for them, and 3 heads cost 3.
Launched by `depth_forward.run`.
"""

# The arguments of Triton functions have no Python types, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from moda_compile.kernels.tiles import (
    load_once,
    load_sides,
    program_rows,
    row_cells,
    row_offsets,
    write_table,
)


# Each layer has another number of slots, and all launch the same kernel.
@triton.jit(do_not_specialize=["slots"])
def depth_forward_vector_kernel(
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
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIES: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
    SLOT_ALIGN: tl.constexpr,
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
    """Write out and lse of the joint softmax; arguments as of `depth_forward_kernel`."""
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
    factor = tl.cast(scale, tl.float32) * LOG2E
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

    # Online softmax in base 2, for each query head: running maximum, sum of 2^(z - maximum), and
    # weighted values. The sequence part is the first element: z = lse_seq, weight 1, value out_seq.
    q, total, maximum, weight = (), (), (), ()
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        cells = row_cells(query, batch, head, token, dim, query_strides, ALIGN)
        q += (load_once(cells, live).to(tl.float32) * factor,)
        cells = row_cells(sequence_out, batch, head, token, dim, sequence_strides, ALIGN)
        total += (load_once(cells, live).to(tl.float32),)
        entries = sequence_lse + row_offsets(batch, head, token, sequence_lse_strides)
        maximum += (tl.load(entries, mask=row_live, other=0.0) * LOG2E,)
        weight += (tl.full([ROWS], 1.0, tl.float32),)

    # The assembler moves a load down to where its value is used, where it waits alone. What the
    # next turn of the loop takes it leaves together, and on its way during this turn (AHEAD). With
    # more stages the compiler has the loads of later turns copied to shared memory meanwhile.
    if AHEAD:
        k, v = load_sides(
            key, value, table, 0, slots, batch, kv_head, token, dim, live, key_strides,
            value_strides, SLOTS, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
    for first in tl.range(0, slots, SLOTS, num_stages=1 if AHEAD else STAGES):
        coming = first + SLOTS if AHEAD else first
        coming_k, coming_v = load_sides(
            key, value, table, coming, slots, batch, kv_head, token, dim, live, key_strides,
            value_strides, SLOTS, COLUMNS, TABLE, UNIFORM, SLOT_ALIGN,
        )  # fmt: skip
        if not AHEAD:
            k, v = coming_k, coming_v
        new_total, new_maximum, new_weight = (), (), ()
        for member in tl.static_range(GROUP):
            z = ()
            most = maximum[member]
            for place in tl.static_range(SLOTS):
                score = tl.sum(k[place].to(tl.float32) * q[member], 1)
                score = tl.where(first + place < slots, score, float("-inf"))
                most = tl.maximum(most, score)
                z += (score,)
            shrink = tl.exp2(maximum[member] - most)
            sum_p = weight[member] * shrink
            sum_pv = total[member] * shrink[:, None]
            for place in tl.static_range(SLOTS):
                p = tl.exp2(z[place] - most)
                sum_p += p
                sum_pv += p[:, None] * v[place].to(tl.float32)
            new_maximum += (most,)
            new_weight += (sum_p,)
            new_total += (sum_pv,)
        maximum, weight, total = new_maximum, new_weight, new_total
        if AHEAD:
            k, v = coming_k, coming_v

    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        cells = row_cells(out, batch, head, token, dim, out_strides, ALIGN)
        mean = total[member] / weight[member][:, None]
        tl.store(cells, mean.to(out.dtype.element_ty), mask=live)
        entries = lse + row_offsets(batch, head, token, lse_strides)
        tl.store(entries, (maximum[member] + tl.log2(weight[member])) * LN2, mask=row_live)
