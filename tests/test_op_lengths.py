"""More keys than queries, as with a KV cache: forward and every gradient against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moda_compile import InputError, moda_attention
from moda_compile.testing import moda_attention_reference
from tests.op_cases import compare, layouts, make, moda, run

LENGTHS = [(1, 1), (1, 2), (1, 130), (3, 4), (5, 33), (4, 3), (7, 1), (2, 0), (1, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def aligned(queries: int, keys: int) -> Tensor:
    """The causal mask [Tq, Tk] whose last row sees everything."""
    row, column = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    return column <= row + keys - queries


def check(tensors: list[Tensor], *, is_causal: bool, attn_mask: Tensor | None = None) -> None:
    """As `op_cases.check`; the oracle is told by a mask what causal means."""
    got = run(moda, tensors, is_causal=is_causal, attn_mask=attn_mask)
    told: dict[str, Any] = {"attn_mask": attn_mask}
    if is_causal:
        told["attn_mask"] = aligned(tensors[0].shape[2], tensors[1].shape[2])
    elif attn_mask is not None and attn_mask.dtype != torch.bool:
        told["attn_mask"] = attn_mask.detach().double().requires_grad_(attn_mask.requires_grad)
    exact = run(moda_attention_reference, [x.double() for x in tensors], is_causal=False, **told)
    compare(got, exact, tensors[0].dtype)


@pytest.mark.parametrize("slots", [0, 1, 4])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_lengths(queries: int, keys: int, is_causal: bool, slots: int) -> None:
    """With fewer keys than queries the first rows see none of them."""
    check(make(t=queries, keys=keys, s=slots), is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hk", "groups", "d"), [(1, 1, 8), (2, 3, 40), (1, 8, 64), (2, 4, 128)])
@pytest.mark.parametrize("queries", [1, 6])
def test_dtypes_and_heads(queries: int, hk: int, groups: int, d: int, dtype: torch.dtype) -> None:
    tensors = make(t=queries, keys=19, hk=hk, groups=groups, d=d, dtype=dtype)
    check(tensors, is_causal=True)


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("kind", ["left padding", "static cache", "heads", "one row", "nothing"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("queries", [1, 4])
def test_masks(kind: str, additive: bool, queries: int, slots: int) -> None:
    keys, column = 11, torch.arange(11)
    causal = aligned(queries, keys)
    mask = {
        "left padding": causal & (column >= 3 * torch.arange(2)[:, None, None, None]),
        "static cache": column <= torch.arange(5, 5 + queries)[:, None],  # filled up to there
        "heads": causal & (column % (1 + torch.arange(4)[:, None, None]) == 0),
        "one row": (column > 2)[None, None, None],
        "nothing": torch.zeros(1, 1, queries, 1, dtype=torch.bool),
    }[kind]
    if additive:
        numbers = torch.randn(mask.shape, dtype=torch.float64)
        mask = numbers.masked_fill(~mask, -torch.inf).requires_grad_()
    check(make(t=queries, keys=keys, s=slots), is_causal=False, attn_mask=mask)


def test_strides_change_nothing() -> None:
    """A cache is a slice of a longer buffer; queries and slots may lie in any order."""
    tensors = make(t=3, keys=9)
    expected = run(moda, tensors, is_causal=True)
    for name in layouts(tensors[0]):
        got = run(moda, [layouts(x)[name] for x in tensors], is_causal=True)
        compare(got, expected, torch.float64)
    buffers = [torch.full((2, 2, 20, 16), torch.nan, dtype=torch.float64) for _ in range(2)]
    for buffer, x in zip(buffers, tensors[1:3], strict=True):
        buffer[:, :, 4:13] = x
    sliced = [tensors[0], *(buffer[:, :, 4:13] for buffer in buffers), *tensors[3:]]
    compare(run(moda, sliced, is_causal=True), expected, torch.float64)


def test_decoding_token_by_token_is_one_pass() -> None:
    """Row t of a causal pass is a query over the first t + 1 keys, with its own token's slots."""
    q, k, v, depth_k, depth_v = make(t=9)
    whole = moda_attention(q, k, v, depth_k, depth_v, is_causal=True)
    assert isinstance(whole, Tensor)
    for at, step in ((0, 4), (4, 1), (5, 3), (8, 1)):
        rows = slice(at, at + step)
        part = moda_attention(
            q[:, :, rows], k[:, :, : at + step], v[:, :, : at + step],
            depth_k[:, :, :, rows], depth_v[:, :, :, rows], is_causal=True,
        )  # fmt: skip
        torch.testing.assert_close(part, whole[:, :, rows], rtol=0.0, atol=1e-13)


def test_compiled_for_any_number_of_keys() -> None:
    """A growing cache is two compilations: one for the first length, one for all others."""
    compilations = 0

    def backend(gm: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(moda_attention, backend=backend, fullgraph=True)
    for keys in (3, 4, 5, 17, 64):
        tensors = make(t=1, keys=keys)
        got, expected = (f(*tensors, is_causal=True) for f in (compiled, moda_attention))
        torch.testing.assert_close(got, expected)
    assert compilations <= 2


def test_shapes_that_do_not_fit() -> None:
    q, k, v, depth_k, depth_v = make(t=3, keys=5)
    with pytest.raises(InputError, match=r"expected \[B, Hk, Tk, d\]"):
        moda_attention(q, k, v[:, :, :4], depth_k, depth_v, is_causal=True)
    with pytest.raises(InputError, match=r"\[S, B, Hk, Tq, d\] = \[S, 2, 2, 3, 16\]"):
        moda_attention(q, k, v, k[None], v[None], is_causal=True)
    mask = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(InputError, match=r"\[B, Hq, Tq, Tk\] = \[2, 4, 3, 5\]"):
        moda_attention(q, k, v, depth_k, depth_v, is_causal=False, attn_mask=mask)
    with pytest.raises(InputError, match=r"\[B, Hq, Tq, Tk\]"):
        torch.ops.moda_compile.depth_attention(q, k, v, [], [], False, 1.0, mask)
