"""The CPU kernels by themselves: slots as separate tensors, the accumulator, strides, dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moda_compile.kernels import cpu
from moda_compile.testing import moda_attention_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
B, HK, G, T, D, S = 2, 2, 3, 9, 8, 3
SCALE = 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(dtype: torch.dtype = torch.float64, slots: int = S) -> tuple[Any, ...]:
    """q, k, v, depth_k, depth_v: the slots in as many memory layouts as there are slots."""

    def layout(x: Tensor, i: int) -> Tensor:
        if i % 3 == 0:
            return x.transpose(1, 2).contiguous().transpose(1, 2)  # token-major
        if i % 3 == 1:
            return torch.stack([x, x + math.nan], dim=-1)[..., 0]  # every second element
        return torch.cat([x, x + math.nan], dim=1)[:, : x.shape[1]]  # cut out of a fused qkv

    q, k, v = (normal(B, h, T, D, seed=i).to(dtype) for i, h in enumerate((HK * G, HK, HK)))
    depth_k = [layout(normal(B, HK, T, D, seed=10 + i).to(dtype), i) for i in range(slots)]
    depth_v = [layout(normal(B, HK, T, D, seed=20 + i).to(dtype), i + 1) for i in range(slots)]
    return q, k, v, depth_k, depth_v


def exact(
    q: Tensor, k: Tensor, v: Tensor, depth_k: Any, depth_v: Any, grad: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, d depth_k, d depth_v in float64."""
    empty = k.double().new_empty(0, *k.shape)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    leaves += [
        (torch.stack([y.double() for y in x]) if x else empty).requires_grad_()
        for x in (depth_k, depth_v)
    ]
    out, lse = moda_attention_reference(*leaves, **options)
    return out, lse, *torch.autograd.grad(out, leaves, grad.double())


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """A dozen roundings of the largest entry: p, dz, two parts merged, sums over heads and T."""
    bound = 12 * torch.finfo(dtype).eps * max(expected.abs().max().item(), 1.0)
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max().item() <= bound


def new_accumulator(rows: int, dtype: torch.dtype) -> Tensor:
    """Zeros [rows, 2, B, Hk, T, d] in a layout of its own."""
    return torch.zeros(B, T, HK, D, rows, 2, dtype=dtype).permute(4, 5, 0, 2, 1, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("slots", [0, 1, S])
@pytest.mark.parametrize("scale", [SCALE, -SCALE, 0.0])
def test_forward_and_backward(
    dtype: torch.dtype, is_causal: bool, slots: int, scale: float
) -> None:
    tensors = inputs(dtype, slots)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    grad = normal(B, HK * G, T, D, seed=5).to(dtype).mT.contiguous().mT
    expected = exact(*tensors, grad, **options)
    out, lse = cpu.forward(*tensors, **options)
    wide = torch.promote_types(dtype, torch.float32)
    assert (out.dtype, lse.dtype) == (dtype, wide)
    close(out, expected[0], dtype)
    if dtype == wide:
        close(lse, expected[1], wide)
    else:  # ATen's exponential for low precision is good to 1e-4, far below the dtype's own eps
        torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=2e-4)
    accumulator = new_accumulator(slots + 1, wide)
    *gradients, dmask = cpu.backward(grad, *tensors, out, lse, accumulator, **options)
    assert dmask is None
    for got, right in zip(gradients, expected[2:5], strict=True):
        assert got.dtype == dtype
        close(got, right, dtype)
    if slots:
        close(accumulator[:slots, 0], expected[5], dtype)
        close(accumulator[:slots, 1], expected[6], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_accumulator_is_added_to_and_rows_behind_it_are_not_touched(
    dtype: torch.dtype,
) -> None:
    q, k, v, depth_k, depth_v = inputs(dtype)
    out, lse = cpu.forward(q, k, v, depth_k, depth_v, is_causal=True, scale=SCALE)

    def backward(accumulator: Tensor) -> Tensor:
        cpu.backward(
            out, q, k, v, depth_k, depth_v, out, lse, accumulator, is_causal=True, scale=SCALE
        )
        return accumulator

    alone = backward(new_accumulator(S, torch.float32))
    before = new_accumulator(S + 2, torch.float32)
    before[:S] = 3.0
    before[S:] = math.nan  # a slot that this layer does not read
    memory = before.data_ptr()
    after = backward(before)
    assert after.data_ptr() == memory
    torch.testing.assert_close(after[:S], alone + 3.0, rtol=0, atol=1e-6)  # one float32 addition
    assert after[S:].isnan().all()


def test_strides_change_nothing() -> None:
    q, k, v, depth_k, depth_v = inputs()
    dense = [[x.contiguous() for x in depth] for depth in (depth_k, depth_v)]
    one = cpu.forward(q, k, v, depth_k, depth_v, is_causal=True, scale=SCALE)
    other = cpu.forward(q, k, v, *dense, is_causal=True, scale=SCALE)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)  # sums over d in another order


def test_layout_of_the_results() -> None:
    tensors = inputs()
    for slots in (0, S):
        q, k, v = tensors[:3]
        depth_k, depth_v = tensors[3][:slots], tensors[4][:slots]
        options: dict[str, Any] = {"is_causal": True, "scale": SCALE}
        out, lse = cpu.forward(q, k, v, depth_k, depth_v, **options)
        accumulator = new_accumulator(S, torch.float64)
        *made, _ = cpu.backward(q, q, k, v, depth_k, depth_v, out, lse, accumulator, **options)
        assert lse.is_contiguous()
        for x in (out, *made):
            assert x.transpose(1, 2).is_contiguous()


class FreshMemoryIsNaN(TorchDispatchMode):
    """Whatever asks for uninitialised memory gets NaN, and inputs may not be written to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like", "empty_strided"):
            result.fill_(math.nan)
        return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slots", [0, S])
def test_nothing_unwritten_is_read(slots: int, masked: bool) -> None:
    tensors = inputs(slots=slots)
    copies = [x.clone() for x in (*tensors[:3], *tensors[3], *tensors[4])]
    options: dict[str, Any] = {"is_causal": not masked, "scale": SCALE}
    if masked:  # the first two rows see nothing
        options["mask"] = normal(1, HK * G, T, T, seed=7).masked_fill(
            ~torch.ones(T, T, dtype=torch.bool).tril(-2), -math.inf
        )
    accumulators = [new_accumulator(S, torch.float64) for _ in range(2)]

    def run(accumulator: Tensor) -> list[Tensor]:
        out, lse = cpu.forward(*tensors, **options)
        *gradients, dmask = cpu.backward(
            out, *tensors, out, lse, accumulator, **options, mask_gradient=masked
        )
        assert (dmask is not None) == masked
        return [out, lse, *gradients, *([dmask] if masked else [])]

    plain = run(accumulators[0])
    with FreshMemoryIsNaN():
        poisoned = run(accumulators[1])
    for x, y in zip([*plain, accumulators[0]], [*poisoned, accumulators[1]], strict=True):
        assert torch.equal(x, y)
    now = [*tensors[:3], *tensors[3], *tensors[4]]
    assert all(torch.equal(x, y) for x, y in zip(now, copies, strict=True))


def test_a_minus_infinity_slot_is_ignored() -> None:
    """exp(-inf) = 0: a slot whose score is -inf takes no weight and makes no NaN."""
    q, k, v, depth_k, depth_v = inputs()
    q = q.abs()
    depth_k = [*depth_k[:2], torch.full_like(k, -math.inf)]
    out, lse = cpu.forward(q, k, v, depth_k, depth_v, is_causal=True, scale=SCALE)
    right, right_lse = cpu.forward(q, k, v, depth_k[:2], depth_v[:2], is_causal=True, scale=SCALE)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-14)  # a sum with one zero more
    torch.testing.assert_close(lse, right_lse, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)], ids=["B=0", "T=0"])
def test_empty(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, dtype=torch.float64)
    options: dict[str, Any] = {"is_causal": True, "scale": SCALE}
    out, lse = cpu.forward(q, q, q, [q], [q], **options)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    accumulator = q.new_zeros(1, 2, *shape)
    assert all(
        x.shape == q.shape
        for x in cpu.backward(q, q, q, q, [q], [q], out, lse, accumulator, **options)[:3]
    )
