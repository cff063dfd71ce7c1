"""Helpers shared by the Triton kernels: where a tile lies in memory, and products of tiny tiles.

Names of tile axes: token (TOKENS of them a program), slot (SLOTS a step), head (the query heads of
one key/value head, padded to PADDED_GROUP), and head_dim (padded to PADDED_DIM). Padding exists in
registers only: a masked lane is never read or written.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

TABLE_COLUMNS = 8
"""int64 columns of a slot table: key address, its (batch, head, token) strides; same of value."""


@triton.jit
def batched_dot(a, b, EMULATED: tl.constexpr):
    """One small matrix product per token: [token, m, k] x [token, k, n] in float32.

    float32 operands are multiplied exactly (ieee, not tf32). EMULATED widens the operands first:
    Triton's interpreter returns garbage for bfloat16 products. Triton spreads the warps over tokens
    in a three-dimensional product; a tile of one token is multiplied as two-dimensional, where they
    share the token's rows and columns.
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
def head_rows(
    base, batch, head, token, stride_batch, stride_head, stride_token, ALIGN: tl.constexpr
):
    """Addresses [token, head] of the rows base[batch, head, token, :].

    ALIGN is the number of bytes that divides every row's address: without the hint Triton can't
    prove it for strides such as 76 and would load one element at a time.
    """
    rows = base + batch * stride_batch + head[None, :] * stride_head + token[:, None] * stride_token
    return tl.multiple_of(rows, [ALIGN, ALIGN])


@triton.jit
def slot_rows(
    base,
    table,
    slot,
    live,
    batch,
    head,
    token,
    stride_slot,
    stride_batch,
    stride_head,
    stride_token,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Addresses [token, slot] of the rows slot[batch, head, token, :].

    STACKED (not TABLE): all slots lie stride_slot elements apart from base. TABLE: row `slot` of
    the table holds the slot's own address at COLUMN and, unless UNIFORM says that the scalar
    strides hold for all slots, its own (batch, head, token) strides in the next three columns.
    base then only lends its element type.
    """
    if TABLE:
        entry = table + slot * COLUMNS + COLUMN
        address = tl.load(entry, mask=live, other=0)
        start = address.to(tl.pointer_type(base.dtype.element_ty))
        if UNIFORM:
            start += batch * stride_batch + head * stride_head
            rows = start[None, :] + token[:, None] * stride_token
        else:
            start += batch * tl.load(entry + 1, mask=live, other=0)
            start += head * tl.load(entry + 2, mask=live, other=0)
            step = tl.load(entry + 3, mask=live, other=0)
            rows = start[None, :] + token[:, None] * step[None, :]
    else:
        start = base + batch * stride_batch + head * stride_head
        rows = start + slot[None, :] * stride_slot + token[:, None] * stride_token
    return tl.multiple_of(rows, [ALIGN, ALIGN])
