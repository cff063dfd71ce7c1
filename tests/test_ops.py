"""The operators against a float64 oracle: numerics, memory, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_compile import InputError, moda_attention
from moda_compile.testing import moda_attention_reference
from tests.op_cases import NAMES, Largest, check, compare, layouts, make, moda, run

OPS = torch.ops.moda_compile
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# --- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 40, 64, 80, 128])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_dtypes_and_head_dims(dtype: torch.dtype, head_dim: int, is_causal: bool) -> None:
    check(make(d=head_dim, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(24, 16), (16, 24), (1, 8), (12, 5)])
@pytest.mark.parametrize("slots", [0, 3])
def test_values_of_another_head_dim(d: int, dv: int, slots: int, dtype: torch.dtype) -> None:
    tensors = make(d=d, dv=dv, s=slots, dtype=dtype)
    check(tensors, is_causal=True)
    check(tensors, is_causal=False, attn_mask=torch.ones(7, 7).tril(-1).bool())
    out, _ = moda(*tensors, is_causal=True)
    assert out.shape == (2, 4, 7, dv) and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("slots", [0, 1, 5])
@pytest.mark.parametrize(("hk", "groups"), [(1, 1), (3, 1), (1, 3), (2, 4), (1, 8)])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_groups_and_slots(slots: int, hk: int, groups: int, is_causal: bool) -> None:
    check(make(hk=hk, groups=groups, s=slots), is_causal=is_causal)


# 513 and 1030 cross the flash kernel's blocks of queries and of keys.
@pytest.mark.parametrize("t", [0, 1, 2, 33, 129, 513, 1030])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lengths(t: int, dtype: torch.dtype) -> None:
    check(make(b=1, hk=1, t=t, d=8, s=2, dtype=dtype), is_causal=True)


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("sizes", [{"b": 0}, {"t": 0}, {"b": 0, "t": 0}], ids=str)
def test_empty(sizes: dict[str, int], slots: int) -> None:
    check(make(**sizes, s=slots), is_causal=True)


@pytest.mark.parametrize("scale", [0.0, 0.37, -1.5, 3])
def test_scale(scale: float) -> None:
    check(make(), is_causal=True, scale=scale)


def test_default_scale() -> None:
    tensors = make(d=40)
    default = moda_attention(*tensors, is_causal=True)
    given = moda_attention(*tensors, is_causal=True, scale=1 / math.sqrt(40))
    assert isinstance(default, Tensor)
    assert torch.equal(default, given)


@pytest.mark.parametrize("large", [30.0, 100.0])
def test_sharp_softmax(large: float) -> None:
    """Scores in the hundreds: exp of a raw score would overflow in float32."""
    q, k, v, depth_k, depth_v = make(dtype=torch.float32)
    got, lse = moda(q * large, k, v, depth_k, depth_v, is_causal=True)
    expected, exact = moda_attention_reference(
        *(x.double() for x in (q * large, k, v, depth_k, depth_v)), is_causal=True
    )
    # A score of size z has an absolute rounding error of some eps * z, and so has log p.
    bound = 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert (got.double() - expected).abs().max().item() <= bound * v.abs().max().item()
    assert (lse.double() - exact).abs().max().item() <= bound


def test_without_slots_it_is_plain_attention() -> None:
    q, k, v, depth_k, depth_v = make(s=0, dtype=torch.float32)
    got = moda_attention(q, k, v, depth_k, depth_v, is_causal=True)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert torch.equal(got, plain)


def test_slots_of_the_own_token_only() -> None:
    """Changing token 3's slots changes row 3 and nothing else."""
    q, k, v, depth_k, depth_v = make()
    before = moda_attention(q, k, v, depth_k, depth_v, is_causal=False)
    depth_k[:, :, :, 3] += 1.0
    depth_v[:, :, :, 3] += 1.0
    changed = moda_attention(q, k, v, depth_k, depth_v, is_causal=False) - before
    assert changed[:, :, 3].abs().min() > 0
    changed[:, :, 3] = 0
    assert changed.abs().max() == 0


def test_the_order_of_slots_does_not_matter() -> None:
    q, k, v, depth_k, depth_v = make(s=5)
    order = torch.tensor([3, 0, 4, 2, 1])
    one = moda_attention(q, k, v, depth_k, depth_v, is_causal=True)
    other = moda_attention(q, k, v, depth_k[order], depth_v[order], is_causal=True)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)  # sums of 5 in another order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_is_natural_and_wide(dtype: torch.dtype) -> None:
    out, lse = moda(*make(dtype=dtype), is_causal=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # q = 0: every score is 0, so row t sums exp(0) over t + 1 tokens and 3 slots.
    q, *others = make(dtype=dtype)
    _, lse = moda(torch.zeros_like(q), *others, is_causal=True)
    expected = torch.arange(4, 4 + q.shape[2], dtype=lse.dtype).log().expand_as(lse)
    torch.testing.assert_close(lse, expected, rtol=4 * torch.finfo(lse.dtype).eps, atol=0)


def test_lse_is_not_differentiable() -> None:
    q, *others = make()
    out, lse = moda(q.requires_grad_(), *others, is_causal=True)
    assert out.requires_grad
    assert not lse.requires_grad


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reversed", "every second", "token major", "offset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_strides(kind: str, dtype: torch.dtype) -> None:
    check([layouts(x)[kind] for x in make(dtype=dtype)], is_causal=True)


@pytest.mark.parametrize("which", range(5), ids=NAMES)
def test_expanded_inputs(which: int) -> None:
    """Stride 0 over the batch: one layer's K for all; gradients come per batch entry."""
    tensors = make()
    axis = 0 if which < 3 else 1
    tensors[which] = tensors[which].narrow(axis, 0, 1).expand_as(tensors[which])
    check(tensors, is_causal=True)


def test_slots_that_are_one_expanded_slot() -> None:
    tensors = make(s=4)
    for i in (3, 4):
        tensors[i] = tensors[i][:1].expand(4, -1, -1, -1, -1)
    check(tensors, is_causal=False)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "every second"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_strided_gradient(kind: str, dtype: torch.dtype) -> None:
    """`out.sum()` hands back an expanded scalar."""
    tensors = make(dtype=dtype)
    leaves = [x.requires_grad_() for x in tensors]
    out = moda_attention(*leaves, is_causal=True)
    assert isinstance(out, Tensor)
    grad = {
        "expanded": torch.ones((), dtype=dtype).expand_as(out),
        "transposed": torch.randn(out.mT.shape, dtype=torch.float64).to(dtype).mT,
        "every second": layouts(torch.randn_like(out))["every second"],
    }[kind]
    got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, grad.contiguous())
    for x, y in zip(got, dense, strict=True):
        # One rounding: rowsum(grad * out) may sum in another order.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x, y, rtol=eps, atol=eps * y.abs().max().item())


def test_results_are_token_major() -> None:
    """[B, T, H, d] in memory, so that the transpose behind attention is free."""
    q, k, v, *_ = make()
    out, lse = moda(*make(), is_causal=True)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    *gradients, dmask = OPS.depth_attention_backward(
        out, q, k, v, [], [], out, lse, None, True, 0.25
    )
    assert dmask.shape == (0,)
    assert all(x.transpose(1, 2).is_contiguous() for x in gradients)


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_nan_stays_in_its_row(is_causal: bool, slots: int) -> None:
    q, k, v, depth_k, depth_v = make(t=40, s=slots)
    clean = moda_attention(q, k, v, depth_k, depth_v, is_causal=is_causal)
    poisoned = torch.zeros(q.shape[:3], dtype=torch.bool)
    q[0, 1, 5, 2] = math.nan
    poisoned[0, 1, 5] = True
    if slots:
        depth_k[1, 1, 0, 17, 0] = math.nan  # KV head 0: query heads 0 and 1
        depth_v[0, 0, 1, 39] = math.nan
        poisoned[1, :2, 17] = poisoned[0, 2:, 39] = True
    out, lse = moda(q, k, v, depth_k, depth_v, is_causal=is_causal)
    assert torch.equal(out.isnan().any(-1), poisoned)
    assert torch.equal(out[~poisoned], clean[~poisoned])
    assert not lse[~poisoned].isnan().any()


def test_the_allocation_counter_counts() -> None:
    with Largest() as largest:
        torch.zeros(1000, 1000)
    assert largest.bytes == 4_000_000


def test_no_square_matrix_is_formed() -> None:
    """At T = 2048 everything allocated, scratch memory included, is far below T x T."""
    t = 2048
    tensors = [x.requires_grad_() for x in make(b=1, hk=1, t=t, d=16, s=2, dtype=torch.float32)]
    with Largest() as largest:
        out = moda_attention(*tensors, is_causal=True)
        assert isinstance(out, Tensor)
        out.sum().backward()
    assert 0 < largest.bytes < t * t * 4


# --- what is refused ----------------------------------------------------------------------------


def other(index: int, change: Callable[[Tensor], Any]) -> list[Any]:
    tensors: list[Any] = make()
    tensors[index] = change(tensors[index])
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (other(0, lambda x: None), r"q: got NoneType, expected a tensor \[B, H, T, d\]"),
        (other(0, lambda x: x[0]), r"q: got \(4, 7, 16\)"),
        (other(3, lambda x: x[0]), r"depth_k: got .* \[S, B, Hk, T, d\]"),
        (other(4, lambda x: [x]), "depth_v: got list"),
        (other(0, lambda x: x.float()), "k: got torch.float64 beside q's torch.float32"),
        (other(2, lambda x: x.half()), "v: got torch.float16 beside q's torch.float64"),
        (make(dtype=torch.int32), "q: got torch.int32 .* out of torch.float16"),
        (make(dtype=torch.complex64), "q: got torch.complex64"),
        (other(1, lambda x: x.to("meta")), "k: on meta, but q is on cpu"),
        (other(1, lambda x: x[:, :, :3]), r"k, v: got \(2, 2, 3, 16\) and \(2, 2, 7, 16\)"),
        (other(1, lambda x: x[..., :3]), r"k, v: got .* as q is \(2, 4, 7, 16\)"),
        (other(1, lambda x: x[:, :1]), r"k, v: got \(2, 1, 7, 16\) and \(2, 2, 7, 16\)"),
        (other(2, lambda x: x[:, :1]), r"k, v: got \(2, 2, 7, 16\) and \(2, 1, 7, 16\)"),
        (other(0, lambda x: x[:1]), "k, v: got"),
        (other(0, lambda x: x[:, :3]), "q has 3 heads, which is not a multiple of the 2"),
        (other(0, lambda x: x[:, :0]), "q has 0 heads"),
        (make(hk=0), "q has 0 heads"),
        (make(d=0), "q has head_dim 0"),
        (make(dv=0), "v has head_dim 0"),
        (make()[:4] + make(dv=8)[4:], r"depth_k, depth_v: got .* \[S, B, Hk, Tq, dv\] = .*, 16\]"),
        (make(dv=8)[:4] + make()[4:], r"depth_k, depth_v: got .* \[S, B, Hk, Tq, dv\] = .*, 8\]"),
        (other(3, lambda x: x[:2]), r"depth_k, depth_v: got \(2, 2, 2, 7, 16\) and \(3, 2"),
        (other(4, lambda x: x[:, :1]), r"depth_k, depth_v: .* \[S, 2, 2, 7, 16\]"),
        (make()[:3] + make(hk=4)[3:], r"depth_k, depth_v: got .* expected \[S, B, Hk, Tq, d\]"),
        (make()[:3] + make(t=8)[3:], r"depth_k, depth_v: got .* expected \[S, B, Hk, Tq, d\]"),
    ],
)
def test_bad_inputs(tensors: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        moda_attention(*tensors, is_causal=True)


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        (1, (2, 1, 7, 16)),
        (2, (2, 1, 7, 16)),
        (2, (2, 2, 7, 8)),
        (0, (2, 3, 7, 16)),
        (3, (2, 1, 7, 16)),
        (4, (2, 2, 6, 16)),
    ],
    ids=str,
)
def test_the_inner_operators_refuse_what_would_corrupt_memory(
    index: int, shape: tuple[int, ...]
) -> None:
    """ATen's CPU flash attention reads and writes out of bounds if K and V differ in heads."""
    q, k, v, depth_k, depth_v = make()
    arguments: list[Any] = [q, k, v, list(depth_k), list(depth_v)]
    if index < 3:
        arguments[index] = torch.randn(shape, dtype=q.dtype)
    else:
        arguments[index][1] = torch.randn(shape, dtype=q.dtype)
    token = OPS.write_slot(None, k, v, 0, 3, torch.float64)
    with pytest.raises(InputError, match="depth_attention"):
        OPS.depth_attention(*arguments, True, 0.25)
    with pytest.raises(InputError, match="depth_attention"):
        OPS.attend(*arguments[:3], token, *arguments[3:], True, 0.25)
    with pytest.raises(InputError, match="depth_attention"):
        OPS.depth_attention_backward(
            q, *arguments, q, q[..., 0], torch.zeros(3, 2, *k.shape, dtype=q.dtype), True, 0.25
        )


def test_slots_come_in_pairs() -> None:
    q, k, v, depth_k, depth_v = make()
    with pytest.raises(InputError, match="3 depth keys but 2 depth values"):
        OPS.depth_attention(q, k, v, list(depth_k), list(depth_v)[:2], True, 0.25)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    tensors = [x.cuda() for x in make(d=64, t=33, dtype=torch.bfloat16)]
    got = run(moda, tensors, is_causal=True)
    exact = run(moda_attention_reference, [x.double() for x in tensors], is_causal=True)
    compare(got, exact, torch.bfloat16)
