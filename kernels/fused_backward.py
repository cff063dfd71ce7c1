"""Backward of `fused_forward`: two kernels, one by rows of queries and one by keys.

With the joint lse, and delta = do . o of a row,

    p = exp(z - lse);  dz = p (do . v - delta);  dq = scale sum dz k   over keys and slots
    dk = scale sum_rows dz q;  dv = sum_rows p do

The first kernel writes dq, delta, and the slots' gradients, whose sums over a token's rows stay
inside a program; the second dk and dv of the sequence's keys. No atomics: the same inputs give the
same bits.
"""

# The arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_compile.kernels import configs, launch, slot_table, tiles
from moda_compile.kernels.fused_forward import (
    last_key,
    load_rows,
    mask_strides,
    program_tokens,
    sees,
)
from moda_compile.kernels.tiles import load_sides, product, row_offsets


@triton.jit
def fused_query_kernel(
    query,
    key,
    value,
    mask,
    out,
    grad_out,
    lse,
    delta_out,
    grad_query,
    slot_key,
    slot_value,
    table,
    grad_slot_key,
    grad_slot_value,
    queries,
    keys,
    slots,
    kv_heads,
    scale,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    out_strides,
    grad_out_strides,
    lse_strides,
    grad_query_strides,
    slot_key_strides,
    slot_value_strides,
    gradient_strides,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Write grad_query and delta_out, and (GRADIENTS) write or (ACCUMULATE) add to the slots'
    gradients; arguments as of `fused_forward_kernel`. gradient_strides: (slot, batch, head, token,
    head_dim).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, kv_head, block, token, head, row_live = program_tokens(
        queries, kv_heads, GROUP, PADDED_GROUP, TOKENS
    )
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM
    live = row_live[:, None] & dim_live[None, :]
    factor = tl.cast(scale, tl.float32)

    q = load_rows(query, row_offsets(batch, head, token, query_strides), dim, live, ALIGN)
    do = load_rows(grad_out, row_offsets(batch, head, token, grad_out_strides), dim, live, ALIGN)
    o = load_rows(out, row_offsets(batch, head, token, out_strides), dim, live, ALIGN)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_out + (batch * kv_heads * GROUP + head) * queries + token, delta, mask=row_live)
    entries = lse + row_offsets(batch, head, token, lse_strides)
    lse_log2 = tl.load(entries, mask=row_live, other=0.0) * LOG2E
    dq = tl.zeros([TOKENS * PADDED_GROUP, PADDED_DIM], tl.float32)

    key_start = key + batch * key_strides[0] + kv_head * key_strides[1]
    value_start = value + batch * value_strides[0] + kv_head * value_strides[1]
    mask_rows = mask + row_offsets(batch, head, token, mask_strides)
    for first in range(0, last_key(block, queries, keys, CAUSAL, TOKENS), KEYS):
        u = (first + tl.arange(0, KEYS)).to(tl.int64)
        visible = sees(
            token, u, queries, keys, row_live, mask_rows, mask_strides[3], CAUSAL, MASKED
        )
        key_live = (u < keys)[:, None] & dim_live[None, :]
        k = load_rows(key_start, u * key_strides[2], dim, key_live, ALIGN)
        v = load_rows(value_start, u * value_strides[2], dim, key_live, ALIGN)
        z = product(q, tl.trans(k), EMULATED) * (factor * LOG2E)
        # A hidden score is bounded by nothing, and a row without any key has lse -inf.
        p = tl.where(visible, tl.exp2(z - lse_log2[:, None]), 0.0)
        dz = p * (product(do, tl.trans(v), EMULATED) - delta[:, None])
        dq += product(dz.to(k.dtype), k, EMULATED)

    wide_q, wide_do = q.to(tl.float32), do.to(tl.float32)
    own_token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    own_live = (own_token < queries)[:, None] & dim_live[None, :]
    for slot in range(0, slots):
        both = load_sides(
            slot_key, slot_value, table, slot, slots, batch, kv_head, token, dim, live,
            slot_key_strides, slot_value_strides, 1, COLUMNS, TABLE, UNIFORM, ALIGN,
        )  # fmt: skip
        k, v = both[0][0], both[1][0]
        wide_k = k.to(tl.float32)
        p = tl.exp2(tl.sum(wide_q * wide_k, 1) * (factor * LOG2E) - lse_log2)
        p = tl.where(row_live, p, 0.0)
        dz = p * (tl.sum(wide_do * v.to(tl.float32), 1) - delta)
        dq += dz[:, None] * wide_k
        if GRADIENTS:
            dk = dz[:, None] * wide_q * factor
            dv = p[:, None] * wide_do
            dk = tl.sum(tl.reshape(dk, (TOKENS, PADDED_GROUP, PADDED_DIM)), 1)
            dv = tl.sum(tl.reshape(dv, (TOKENS, PADDED_GROUP, PADDED_DIM)), 1)
            rows = tl.cast(slot, tl.int64) * gradient_strides[0] + batch * gradient_strides[1]
            rows += kv_head * gradient_strides[2] + own_token * gradient_strides[3]
            offsets = rows[:, None] + (dim * gradient_strides[4])[None, :]
            if ACCUMULATE:
                dk += tl.load(grad_slot_key + offsets, mask=own_live, other=0.0).to(tl.float32)
                dv += tl.load(grad_slot_value + offsets, mask=own_live, other=0.0).to(tl.float32)
            kind = grad_slot_key.dtype.element_ty
            tl.store(grad_slot_key + offsets, dk.to(kind), mask=own_live)
            tl.store(grad_slot_value + offsets, dv.to(kind), mask=own_live)

    cells = tl.multiple_of(
        grad_query + row_offsets(batch, head, token, grad_query_strides), [ALIGN]
    )
    dq = (dq * factor).to(grad_query.dtype.element_ty)
    tl.store(cells[:, None] + dim[None, :], dq, mask=live)


@triton.jit
def fused_key_kernel(
    query,
    key,
    value,
    mask,
    grad_out,
    lse,
    delta,
    grad_key,
    grad_value,
    queries,
    keys,
    kv_heads,
    scale,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    grad_out_strides,
    lse_strides,
    grad_key_strides,
    grad_value_strides,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Write grad_key and grad_value of the keys; arguments as of `fused_query_kernel`."""
    LOG2E: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(keys, KEYS)
    program = tl.program_id(0)
    pair = program // blocks
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    block = program % blocks
    u = (block * KEYS + tl.arange(0, KEYS)).to(tl.int64)
    seen = u < keys
    dim = tl.arange(0, PADDED_DIM)
    dim_live = dim < HEAD_DIM
    live = seen[:, None] & dim_live[None, :]
    factor = tl.cast(scale, tl.float32)
    k = load_rows(key, row_offsets(batch, kv_head, u, key_strides), dim, live, ALIGN)
    v = load_rows(value, row_offsets(batch, kv_head, u, value_strides), dim, live, ALIGN)
    dk = tl.zeros([KEYS, PADDED_DIM], tl.float32)
    dv = tl.zeros([KEYS, PADDED_DIM], tl.float32)

    row = tl.arange(0, TOKENS * PADDED_GROUP)
    member = row % PADDED_GROUP
    head = kv_head * GROUP + member
    begin = 0
    if CAUSAL:  # the first token that sees a key of this program
        begin = tl.maximum(block * KEYS - (keys - queries), 0) // TOKENS * TOKENS
    for first in range(begin, queries, TOKENS):
        token = (first + row // PADDED_GROUP).to(tl.int64)
        row_live = (token < queries) & (member < GROUP)
        load_live = row_live[:, None] & dim_live[None, :]
        mask_rows = mask + row_offsets(batch, head, token, mask_strides)
        visible = sees(
            token, u, queries, keys, row_live, mask_rows, mask_strides[3], CAUSAL, MASKED
        )
        offsets = row_offsets(batch, head, token, query_strides)
        q = load_rows(query, offsets, dim, load_live, ALIGN)
        offsets = row_offsets(batch, head, token, grad_out_strides)
        do = load_rows(grad_out, offsets, dim, load_live, ALIGN)
        entries = lse + row_offsets(batch, head, token, lse_strides)
        lse_log2 = tl.load(entries, mask=row_live, other=0.0) * LOG2E
        entries = delta + (batch * kv_heads * GROUP + head) * queries + token
        own_delta = tl.load(entries, mask=row_live, other=0.0)
        z = product(k, tl.trans(q), EMULATED) * (factor * LOG2E)
        p = tl.where(tl.trans(visible), tl.exp2(z - lse_log2[None, :]), 0.0)
        dv += product(p.to(do.dtype), do, EMULATED)
        dz = p * (product(v, tl.trans(do), EMULATED) - own_delta[None, :])
        dk += product(dz.to(q.dtype), q, EMULATED)

    cells = grad_key + batch * grad_key_strides[0] + kv_head * grad_key_strides[1]
    cells = tl.multiple_of(cells + u * grad_key_strides[2], [ALIGN])
    dk = (dk * factor).to(grad_key.dtype.element_ty)
    tl.store(cells[:, None] + dim[None, :], dk, mask=live)
    cells = grad_value + batch * grad_value_strides[0] + kv_head * grad_value_strides[1]
    cells = tl.multiple_of(cells + u * grad_value_strides[2], [ALIGN])
    tl.store(cells[:, None] + dim[None, :], dv.to(grad_value.dtype.element_ty), mask=live)


def run(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: slot_table.Slots | None,
    out: Tensor,
    lse: Tensor,
    grad_slot_key: Tensor | None,
    grad_slot_value: Tensor | None,
    *,
    accumulate: bool,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `fused_forward.run`, given its joint out and lse.

    Args:
        grad_out: gradient of out [B, Hq, Tq, d].
        grad_slot_key, grad_slot_value: [N >= S, B, Hk, Tq, d], any strides, the same for both; rows
            i < S are overwritten or, with accumulate, added to. None: they are left to
            `depth_gather`.

    Returns:
        dq [B, Hq, Tq, d], dk, dv [B, Hk, Tk, d], token-major in memory; delta [B, Hq, Tq], float32,
        contiguous.
    """
    b, hq, queries, d = q.shape
    hk, keys = k.shape[1], k.shape[2]
    group = hq // hk
    dq, dk, dv = (launch.token_major_empty(x, x.shape) for x in (q, k, v))
    delta = q.new_empty((b, hq, queries), dtype=torch.float32)
    q, k, v, grad_out, out = (launch.unit_rows(x) for x in (q, k, v, grad_out, out))
    read = slots or slot_table.none(q)
    gradients = False
    gradient_strides: tuple[int, ...] = (0,) * 5
    if slots is None or grad_slot_key is None or grad_slot_value is None:
        grad_slot_key = grad_slot_value = dq  # never touched
    else:
        gradients, gradient_strides = True, grad_slot_key.stride()
    tile = configs.fused_tile(
        head_dim=d, group=group, dtype=q.dtype, capability=launch.capability(q)
    )
    align = min(launch.alignment(q, k, v, grad_out, out, dq, dk, dv), read.align)
    common = dict(
        GROUP=group,
        PADDED_GROUP=configs.power_of_two(group),
        HEAD_DIM=d,
        PADDED_DIM=configs.padded(d),
        TOKENS=tile.tokens,
        KEYS=tile.keys,
        CAUSAL=is_causal,
        MASKED=mask is not None,
        ALIGN=align,
        EMULATED=launch.EMULATED,
        num_warps=tile.warps,
        num_stages=1,
    )
    seen = q if mask is None else mask
    strides = mask_strides(mask, (b, hq, queries, keys))
    with launch.on_device(q):
        launch.launchable(fused_query_kernel)[(b * hk * -(-queries // tile.tokens),)](
            q,
            k,
            v,
            seen,
            out,
            grad_out,
            lse,
            delta,
            dq,
            read.key,
            read.value,
            read.table,
            grad_slot_key,
            grad_slot_value,
            queries,
            keys,
            read.count,
            hk,
            scale,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            strides,
            out.stride()[:3],
            grad_out.stride()[:3],
            lse.stride(),
            dq.stride()[:3],
            read.key_strides,
            read.value_strides,
            gradient_strides,
            COLUMNS=tiles.TABLE_COLUMNS,
            TABLE=read.is_table,
            UNIFORM=read.is_uniform,
            GRADIENTS=gradients,
            ACCUMULATE=accumulate,
            **common,
        )
        if keys > 0:
            launch.launchable(fused_key_kernel)[(b * hk * -(-keys // tile.keys),)](
                q,
                k,
                v,
                seen,
                grad_out,
                lse,
                delta,
                dk,
                dv,
                queries,
                keys,
                hk,
                scale,
                q.stride()[:3],
                k.stride()[:3],
                v.stride()[:3],
                strides,
                grad_out.stride()[:3],
                lse.stride(),
                dk.stride()[:3],
                dv.stride()[:3],
                **common,
            )
    return dq, dk, dv, delta
