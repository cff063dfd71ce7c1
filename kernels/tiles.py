"""Helpers shared by the Triton kernels: where a tile lies in memory, and products of tiny tiles.

Names of tile axes: row (ROWS of them a program, of one (token, key/value head) each), slot (SLOTS
a step), head (the query heads of the row's key/value head, padded), and head_dim (padded to
PADDED_DIM). Padding exists in registers only: a masked lane is never read or written.

The vector kernels have tiles [row, head_dim] alone; slots and query heads are tuples of them.
"""

# The arguments of Triton functions have no Python types, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

TABLE_COLUMNS = 8
"""int64 columns of a slot table: key address, its (batch, head, token) strides; same of value."""

TABLE_ROWS = 48
"""The most rows of a table that a kernel writes itself; see `write_table`."""

TABLE_COPIES = 128
"""Tables that the programs of a launch share where they write it themselves."""


@triton.jit
def product(a, b, EMULATED: tl.constexpr):
    """a [m, k] x b [k, n] in float32; exact (ieee) for float32 operands. See `batched_dot`."""
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def batched_dot(a, b, EMULATED: tl.constexpr):
    """One small matrix product per row: [row, m, k] x [row, k, n] in float32.

    float32 operands are multiplied exactly (ieee, not tf32). EMULATED widens the operands first:
    Triton's interpreter returns garbage for bfloat16 products. Triton spreads the warps over rows
    in a three-dimensional product; a tile of one row is multiplied as two-dimensional, where they
    share the matrix.
    """
    if EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.shape[0] == 1:
        a = tl.reshape(a, (a.shape[1], a.shape[2]))
        b = tl.reshape(b, (b.shape[1], b.shape[2]))
        product = tl.expand_dims(tl.dot(a, b, input_precision="ieee"), 0)
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def group_heads(kv_head, row_live, GROUP: tl.constexpr, PADDED: tl.constexpr):
    """Each row's GROUP query heads, [row, PADDED], and which of them exist."""
    member = tl.arange(0, PADDED)
    live = row_live[:, None] & (member < GROUP)[None, :]
    return kv_head[:, None] * GROUP + member[None, :], live


@triton.jit
def repeat_heads(x, PADDED: tl.constexpr):
    """x [row, slot, head] again and again, [row, slot, PADDED]: a product takes more heads on its
    inner side, where the other operand has zeros for these, and as rows, of which these are not
    stored, than as columns.
    """
    if x.shape[2] < PADDED:
        times: tl.constexpr = PADDED // x.shape[2]
        again = tl.broadcast_to(x[:, :, None, :], (x.shape[0], x.shape[1], times, x.shape[2]))
        x = tl.reshape(again, (x.shape[0], x.shape[1], PADDED))
    return x


@triton.jit
def head_rows(base, batch, head, token, strides, ALIGN: tl.constexpr):
    """Addresses [row, head] of base[batch, head, token, :]; head is [row, head], token [row];
    strides: (batch, head, token).

    ALIGN is the number of bytes that divides every row's address: without the hint Triton can't
    prove it for strides such as 76 and would load one element at a time.
    """
    rows = base + row_offsets(batch, head, token[:, None], strides)
    return tl.multiple_of(rows, [ALIGN, ALIGN])


@triton.jit
def load_rows(base, batch, head, live, token, dim, dim_live, strides, ALIGN: tl.constexpr):
    """base[batch, head, token, dim], [row, head, dim]; 0 where not live [row, head] or not dim_live
    [dim]. Other arguments as for `head_rows`.
    """
    rows = head_rows(base, batch, head, token, strides, ALIGN)
    mask = live[:, :, None] & dim_live[None, None, :]
    return tl.load(rows[:, :, None] + dim[None, None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(base, batch, head, live, token, dim, dim_live, strides, ALIGN: tl.constexpr):
    """As `load_rows`, but [row, dim, head]."""
    rows = head_rows(base, batch, head, token, strides, ALIGN)
    mask = live[:, None, :] & dim_live[None, :, None]
    return tl.load(rows[:, None, :] + dim[None, :, None], mask=mask, other=0.0)


@triton.jit
def slot_rows(
    base,
    table,
    slot,
    live,
    batch,
    head,
    token,
    strides,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Addresses [row, slot] of slot[batch, head, token, :]; slot and live are [slot], head and
    token [row]; strides: (slot, batch, head, token).
    """
    start, stride_batch, stride_head, stride_token = slot_start(
        base,
        table,
        slot,
        live,
        strides[0],
        strides[1],
        strides[2],
        strides[3],
        COLUMN,
        COLUMNS,
        TABLE,
        UNIFORM,
    )
    start += batch * stride_batch
    if TABLE and not UNIFORM:
        stride_head = stride_head[None, :]
        stride_token = stride_token[None, :]
    rows = start[None, :] + (head[:, None] * stride_head + token[:, None] * stride_token)
    return tl.multiple_of(rows, [ALIGN, ALIGN])


@triton.jit
def slot_start(
    base,
    table,
    slot,
    live,
    stride_slot,
    stride_batch,
    stride_head,
    stride_token,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Address of slot[0, 0, 0, 0] and its (batch, head, token) strides; slot a number or [slot].

    STACKED (not TABLE): all slots lie stride_slot elements apart from base. TABLE: row `slot` of
    the table holds the slot's own address at COLUMN and, unless UNIFORM says that the scalar
    strides hold for all slots, its own (batch, head, token) strides in the next three columns.
    base then only lends its element type.
    """
    if TABLE:
        entry = table + slot * COLUMNS + COLUMN
        start = tl.load(entry, mask=live, other=0).to(tl.pointer_type(base.dtype.element_ty))
        if not UNIFORM:
            stride_batch = tl.load(entry + 1, mask=live, other=0)
            stride_head = tl.load(entry + 2, mask=live, other=0)
            stride_token = tl.load(entry + 3, mask=live, other=0)
    else:
        start = base + slot * stride_slot
    return start, stride_batch, stride_head, stride_token


@triton.jit
def ask_for(rows, live, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Have an NVIDIA GPU bring rows of HEAD_DIM elements into its L2 cache; rows: their addresses,
    [row, i], as live.

    Nothing waits for them. What another kernel writes there meanwhile is seen all the same: all
    writes go through that cache.
    """
    SECTOR: tl.constexpr = 256 // rows.dtype.element_ty.primitive_bitwidth  # elements of 32 bytes
    dim = tl.arange(0, PADDED_DIM // SECTOR) * SECTOR
    address = rows[:, :, None] + dim[None, None, :]
    address_live = live[:, :, None] & (dim < HEAD_DIM)[None, None, :]
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [address.to(tl.int64), address_live.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask_for_sides(
    key, value, table, slots, batch, head, token, row_live, key_strides, value_strides,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, TABLE: tl.constexpr, UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """`ask_for` the keys and the values of the first SLOTS slots; arguments as for `slot_rows`."""
    slot = tl.arange(0, SLOTS).to(tl.int64)
    slot_live = slot < slots
    live = row_live[:, None] & slot_live[None, :]
    rows = slot_rows(
        key, table, slot, slot_live, batch, head, token, key_strides,
        0, COLUMNS, TABLE, UNIFORM, ALIGN,
    )  # fmt: skip
    ask_for(rows, live, HEAD_DIM, PADDED_DIM)
    rows = slot_rows(
        value, table, slot, slot_live, batch, head, token, value_strides,
        4, COLUMNS, TABLE, UNIFORM, ALIGN,
    )  # fmt: skip
    ask_for(rows, live, HEAD_DIM, PADDED_DIM)


@triton.jit
def program_rows(tokens, kv_heads, ROWS: tl.constexpr):
    """Which rows are this program's: the batch, and of each row (head, token, whether it exists).

    The key/value heads of a token are neighbours, as they are in the memory of nearly every model:
    programs that run at the same time read whole pages of it. No program has rows of two batches.
    """
    rows = tokens * kv_heads
    blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)
    token = row // kv_heads
    head = row - token * kv_heads
    return (program // blocks).to(tl.int64), head.to(tl.int64), token.to(tl.int64), row < rows


@triton.jit
def row_offsets(batch, head, token, strides):
    """Where x[batch, head, token] lies; head and token are [row], or of shapes that go together;
    strides: the three of x.
    """
    return batch * strides[0] + head * strides[1] + token * strides[2]


@triton.jit
def row_cells(base, batch, head, token, dim, strides, ALIGN: tl.constexpr):
    """Addresses [row, head_dim] of base[batch, head, token, dim], the last stride 1.

    ALIGN as in `head_rows`: a hint to the operation before it, which may not be another function's.
    """
    rows = base + row_offsets(batch, head, token, strides)
    return tl.multiple_of(rows, [ALIGN])[:, None] + dim[None, :]


@triton.jit
def load_once(cells, live):
    """A tile of what is not read again soon: it leaves the L2 cache before what others read."""
    return tl.load(cells, mask=live, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_slots(
    base,
    table,
    first,
    slots,
    batch,
    head,
    token,
    dim,
    live,
    strides,
    COLUMN: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The rows of SLOTS slots from `first` on: a tuple of tiles [row, head_dim], 0 past the last.

    strides: (slot, batch, head, token). A slot's entry of the table is a number: a tile of entries
    would have to change threads to meet the rows.
    """
    tiles = ()
    for place in tl.static_range(SLOTS):
        slot = tl.cast(first + place, tl.int64)
        slot_live = slot < slots
        start, stride_batch, stride_head, stride_token = slot_start(
            base,
            table,
            slot,
            slot_live,
            strides[0],
            strides[1],
            strides[2],
            strides[3],
            COLUMN,
            COLUMNS,
            TABLE,
            UNIFORM,
        )
        own = (stride_batch, stride_head, stride_token)
        cells = row_cells(start, batch, head, token, dim, own, ALIGN)
        tiles += (load_once(cells, live & slot_live),)
    return tiles


@triton.jit
def load_sides(
    key, value, table, first, slots, batch, head, token, dim, live, key_strides, value_strides,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, TABLE: tl.constexpr, UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The keys and the values of SLOTS slots from `first` on: two tuples of `load_slots`."""
    keys = load_slots(
        key, table, first, slots, batch, head, token, dim, live, key_strides, 0,
        SLOTS, COLUMNS, TABLE, UNIFORM, ALIGN,
    )  # fmt: skip
    values = load_slots(
        value, table, first, slots, batch, head, token, dim, live, value_strides, 4,
        SLOTS, COLUMNS, TABLE, UNIFORM, ALIGN,
    )  # fmt: skip
    return keys, values


@triton.jit
def write_table(
    table, COLUMNS: tl.constexpr, COPIES: tl.constexpr,
    n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15,
    n16, n17, n18, n19, n20, n21, n22, n23, n24, n25, n26, n27, n28, n29, n30, n31,
    n32, n33, n34, n35, n36, n37, n38, n39, n40, n41, n42, n43, n44, n45, n46, n47,
    n48, n49, n50, n51, n52, n53, n54, n55, n56, n57, n58, n59, n60, n61, n62, n63,
    n64, n65, n66, n67, n68, n69, n70, n71, n72, n73, n74, n75, n76, n77, n78, n79,
    n80, n81, n82, n83, n84, n85, n86, n87, n88, n89, n90, n91, n92, n93, n94, n95,
):  # fmt: skip
    """A table of the rows that the kernel was given itself: writes it, and returns where it is.

    Row i gets the addresses of n<2 i> and n<2 i + 1>, in groups of eight rows; None ends the list.
    A program writes the whole table before it reads it, so none has to wait for another, and the
    barrier is one of its own threads. Others write the same numbers to the same place: to
    COPIES places [ROWS, COLUMNS], as thousands of programs queue up for one.
    """
    ROWS: tl.constexpr = 48  # TABLE_ROWS, which would leave the kernel's key to chance
    own = table + (tl.program_id(0) % COPIES) * (ROWS * COLUMNS)
    _write_rows(
        own, 0, COLUMNS,
        n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15,
    )  # fmt: skip
    _write_rows(
        own, 8, COLUMNS,
        n16, n17, n18, n19, n20, n21, n22, n23, n24, n25, n26, n27, n28, n29, n30, n31,
    )  # fmt: skip
    _write_rows(
        own, 16, COLUMNS,
        n32, n33, n34, n35, n36, n37, n38, n39, n40, n41, n42, n43, n44, n45, n46, n47,
    )  # fmt: skip
    _write_rows(
        own, 24, COLUMNS,
        n48, n49, n50, n51, n52, n53, n54, n55, n56, n57, n58, n59, n60, n61, n62, n63,
    )  # fmt: skip
    _write_rows(
        own, 32, COLUMNS,
        n64, n65, n66, n67, n68, n69, n70, n71, n72, n73, n74, n75, n76, n77, n78, n79,
    )  # fmt: skip
    _write_rows(
        own, 40, COLUMNS,
        n80, n81, n82, n83, n84, n85, n86, n87, n88, n89, n90, n91, n92, n93, n94, n95,
    )  # fmt: skip
    tl.debug_barrier()
    return own


@triton.jit
def _write_rows(
    table, first, COLUMNS: tl.constexpr,
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
):  # fmt: skip
    """Eight rows of `write_table`, from the row `first` on; nothing where they are None."""
    if a0 is not None:
        entry = table + first * COLUMNS
        tl.store(entry + 0 * COLUMNS, tl.cast(a0, tl.int64))
        tl.store(entry + 0 * COLUMNS + 4, tl.cast(a1, tl.int64))
        tl.store(entry + 1 * COLUMNS, tl.cast(a2, tl.int64))
        tl.store(entry + 1 * COLUMNS + 4, tl.cast(a3, tl.int64))
        tl.store(entry + 2 * COLUMNS, tl.cast(a4, tl.int64))
        tl.store(entry + 2 * COLUMNS + 4, tl.cast(a5, tl.int64))
        tl.store(entry + 3 * COLUMNS, tl.cast(a6, tl.int64))
        tl.store(entry + 3 * COLUMNS + 4, tl.cast(a7, tl.int64))
        tl.store(entry + 4 * COLUMNS, tl.cast(a8, tl.int64))
        tl.store(entry + 4 * COLUMNS + 4, tl.cast(a9, tl.int64))
        tl.store(entry + 5 * COLUMNS, tl.cast(a10, tl.int64))
        tl.store(entry + 5 * COLUMNS + 4, tl.cast(a11, tl.int64))
        tl.store(entry + 6 * COLUMNS, tl.cast(a12, tl.int64))
        tl.store(entry + 6 * COLUMNS + 4, tl.cast(a13, tl.int64))
        tl.store(entry + 7 * COLUMNS, tl.cast(a14, tl.int64))
        tl.store(entry + 7 * COLUMNS + 4, tl.cast(a15, tl.int64))
