"""Masks of the sequence: every kind against the float64 oracle, rows without a key, gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moda_compile import InputError, moda_attention, ops, stacked
from moda_compile.testing import moda_attention_reference
from tests.op_cases import KINDS, Largest, check, compare, layouts, make, moda, run, visible

OPS = torch.ops.moda_compile
assert stacked.attention  # imported: this module's operators are registered at first use
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
B, HQ, T, D = 2, 4, 11, 16


def inputs(**changes: Any) -> list[Tensor]:
    return make(**({"t": T, "d": D} | changes))


def random_bias(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def hidden(mask: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """The additive form of a bool mask."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, value)


# --- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [0, 3])
def test_bool_masks(kind: str, dtype: torch.dtype, slots: int) -> None:
    check(inputs(s=slots, dtype=dtype), is_causal=False, attn_mask=visible(kind, B, HQ, T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_is_the_bool_mask(kind: str, dtype: torch.dtype) -> None:
    tensors, mask = inputs(dtype=dtype), visible(kind, B, HQ, T)
    one = moda(*tensors, is_causal=False, attn_mask=mask)
    other = moda(*tensors, is_causal=False, attn_mask=hidden(mask, -math.inf, dtype))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_additive_masks_of_any_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """The mask is not rounded to the inputs' dtype: the oracle adds it as it came."""
    check(
        inputs(dtype=dtype), is_causal=False, attn_mask=random_bias(1, HQ, T, T, dtype=mask_dtype)
    )


@pytest.mark.parametrize("scale", [0.0, 0.37, -1.5])
@pytest.mark.parametrize("slots", [0, 2])
def test_the_mask_is_added_after_scaling(scale: float, slots: int) -> None:
    options: dict[str, Any] = {"is_causal": False, "scale": scale}
    check(inputs(s=slots), attn_mask=visible("left padding", B, HQ, T), **options)
    check(inputs(s=slots), attn_mask=random_bias(T, T).requires_grad_(), **options)


# ATen's kernel takes blocks of queries and of keys: with the padding on the left, whole blocks of
# keys are hidden from rows that see later ones.
@pytest.mark.parametrize("t", [1, 2, 513, 1030])
@pytest.mark.parametrize("padding", [0, 1, 520])
@pytest.mark.parametrize("slots", [0, 2])
def test_lengths(t: int, padding: int, slots: int) -> None:
    mask = torch.ones(t, t, dtype=torch.bool).tril() & (torch.arange(t) >= padding)
    tensors = make(b=1, hk=1, t=t, d=8, s=slots, dtype=torch.float32)
    check(tensors, is_causal=False, attn_mask=mask)


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("sizes", [{"b": 0}, {"t": 0}, {"b": 0, "t": 0}], ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_empty(sizes: dict[str, int], slots: int, learned: bool) -> None:
    tensors = make(**sizes, s=slots)
    b, heads, t, _ = tensors[0].shape
    check(tensors, is_causal=False, attn_mask=random_bias(b, 1, t, t).requires_grad_(learned))
    check(tensors, is_causal=False, attn_mask=random_bias(1, heads, 1, t).requires_grad_(learned))
    check(tensors, is_causal=False, attn_mask=torch.ones(t, t, dtype=torch.bool))


def test_the_slots_are_never_masked() -> None:
    """Without a visible key all the weight is on the slots, and the keys get no gradient."""
    tensors = inputs(t=5)
    q, k, v, depth_k, depth_v = tensors
    out, lse, gradients = run(moda, tensors, is_causal=False, attn_mask=torch.tensor(False))
    z = torch.einsum("bhtd,sbhtd->bhts", q, depth_k.repeat_interleave(2, 2)) / math.sqrt(D)
    expected = torch.einsum("bhts,sbhtd->bhtd", z.softmax(-1), depth_v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)  # sums of 3 in another order
    torch.testing.assert_close(lse, z.logsumexp(-1), rtol=0, atol=1e-14)
    assert not gradients[1].any()
    assert not gradients[2].any()
    assert all(gradients[i].abs().min() > 0 for i in (0, 3, 4))


@pytest.mark.parametrize("mask", [False, -math.inf], ids=["bool", "additive"])
def test_a_row_without_any_key_or_slot(mask: float) -> None:
    tensors = inputs(s=0)
    rows = torch.full((T, T), True) if mask is False else torch.zeros(T, T)
    rows[2] = mask
    out, lse, gradients = run(moda, tensors, is_causal=False, attn_mask=rows)
    assert not out[:, :, 2].any()
    assert torch.equal(lse[:, :, 2], torch.full_like(lse[:, :, 2], -math.inf))
    assert lse[:, :, 3].isfinite().all()
    assert not gradients[0][:, :, 2].any()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [0, 2])
def test_the_smallest_number_is_added_like_any_other(
    slots: int, dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    """transformers' way to hide keys. A row with no other key sees all alike, if there is no slot.

    Not by `check`: its bound grows with |lse|, and here lse is as small as numbers get.
    """
    tensors = inputs(s=slots, dtype=dtype)
    smallest = torch.finfo(mask_dtype).min
    mask = hidden(visible("left padding", B, HQ, T), smallest, mask_dtype)
    out, lse, gradients = run(moda, tensors, is_causal=False, attn_mask=mask)
    exact, exact_lse, right = run(
        moda_attention_reference,
        [x.double() for x in tensors],
        is_causal=False,
        attn_mask=mask.double(),
    )
    # float32 holds a score beside -65504 to 2^-8 only: that is the error of log p.
    slack = 2.0**-8 if mask_dtype == torch.float16 and not slots else 0.0
    bound = 16 * torch.finfo(dtype).eps + slack  # two dozen roundings, as in `compare`
    for got, expected in zip((out, *gradients), (exact, *right), strict=True):
        largest = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
        assert not expected.numel() or (got - expected).abs().max().item() <= bound * largest
    live = exact_lse > -1e4
    torch.testing.assert_close(lse[live], exact_lse[live], rtol=0, atol=2e-4)  # as in test_cpu
    assert (lse[~live] < -6e4).all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("additive", [False, True])
def test_nan_stays_in_its_row(additive: bool) -> None:
    q, k, v, depth_k, depth_v = inputs(t=40)
    mask = visible("left padding", B, HQ, 40)
    if additive:
        mask = hidden(mask, -math.inf, q.dtype)
    clean = moda_attention(q, k, v, depth_k, depth_v, is_causal=False, attn_mask=mask)
    poisoned = torch.zeros(q.shape[:3], dtype=torch.bool)
    q[0, 1, 5, 2] = math.nan
    depth_v[0, 0, 1, 39] = math.nan
    poisoned[0, 1, 5] = poisoned[0, 2:, 39] = True
    if additive:
        mask[1, 0, 7, 3] = math.nan
        poisoned[1, :, 7] = True
    out, lse = moda(q, k, v, depth_k, depth_v, is_causal=False, attn_mask=mask)
    assert torch.equal(out.isnan().any(-1), poisoned)
    assert torch.equal(out[~poisoned], clean[~poisoned])
    assert not lse[~poisoned].isnan().any()


# --- the mask's gradient ------------------------------------------------------------------------

SHAPES = [
    (), (1,), (T,), (T, 1), (T, T), (1, T, T), (HQ, T, T), (HQ, 1, T), (1, 1, T, T), (1, HQ, T, T),
    (B, 1, T, T), (B, HQ, T, T), (B, 1, 1, T), (B, HQ, 1, 1), (1, HQ, T, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slots", [0, 2])
def test_gradient_of_a_mask_of_any_shape(shape: tuple[int, ...], slots: int) -> None:
    check(inputs(s=slots), is_causal=False, attn_mask=random_bias(*shape).requires_grad_())


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_mask_of_any_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    mask = random_bias(1, HQ, T, T, dtype=mask_dtype).requires_grad_()
    got = run(moda, tensors, is_causal=False, attn_mask=mask)
    exact = run(
        moda_attention_reference,
        [x.double() for x in tensors],
        is_causal=False,
        attn_mask=mask.detach().double().requires_grad_(),
    )
    coarser = max(dtype, mask_dtype, key=lambda x: torch.finfo(x).eps)
    compare((*got[:2], got[2][:5]), (*exact[:2], exact[2][:5]), dtype)
    compare(got, exact, coarser)  # the mask's gradient is in the mask's dtype


@pytest.mark.parametrize("slots", [0, 2])
def test_gradient_of_a_learned_bias_with_hidden_keys(slots: int) -> None:
    """T5: bias [1, Hq, T, T] + padding. Rows without a visible key have gradient 0, not NaN."""
    mask = visible("left padding", B, HQ, T)
    bias = random_bias(1, HQ, T, T).requires_grad_()
    tensors = inputs(s=slots)

    def add(function: Any) -> Any:
        def call(*x: Tensor, bias: Tensor, **options: Any) -> Any:
            total = bias + hidden(mask, -math.inf, torch.float64)
            return function(*x, attn_mask=total, **options)

        return call

    found = []
    for function in (moda, moda_attention_reference):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = add(function)(*leaves, bias=bias, is_causal=False)
        gradients = torch.autograd.grad(out.sin().sum(), [*leaves, bias], allow_unused=True)
        none = torch.zeros(0, dtype=torch.float64)
        found.append((out, lse, [none if x is None or not x.numel() else x for x in gradients]))
    compare(found[0], found[1], torch.float64)


@pytest.mark.parametrize("kind", ["reversed", "every second", "token major", "offset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_masks_of_any_strides(kind: str, dtype: torch.dtype) -> None:
    mask = layouts(random_bias(B, HQ, T, T, dtype=dtype))[kind]
    mask = mask.detach().requires_grad_()
    assert kind == "offset" or not mask.is_contiguous()
    check(inputs(dtype=dtype), is_causal=False, attn_mask=mask)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_gradient_of_an_expanded_mask(axis: int) -> None:
    """Every element of an expanded mask has a gradient of its own."""
    mask = random_bias(B, HQ, T, T).narrow(axis, 0, 1).expand(B, HQ, T, T)
    check(inputs(), is_causal=False, attn_mask=mask.detach().requires_grad_())


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("square", [False, True])
def test_nothing_larger_than_the_mask_is_formed(
    square: bool, dtype: torch.dtype, expanded: bool
) -> None:
    t, heads = 2048, 4
    tensors = make(b=1, hk=1, groups=heads, t=t, d=8, s=2, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    mask = torch.ones((1, 1, t, t) if square else (1, 1, 1, t), dtype=dtype)
    if expanded:
        mask = mask.expand(1, heads, t, t)
    with Largest() as largest:
        out = moda_attention(*leaves, is_causal=False, attn_mask=mask)
        assert isinstance(out, Tensor)
        out.sum().backward()
    # A bool mask becomes float32, once. Everything else: tensors like q (256 KiB), the slots'
    # gradients (as large), and ATen's scratch memory, 1 MiB whatever T.
    as_numbers = mask.dtype == torch.bool and square
    allowed = 4 * t * t if as_numbers else 2**20
    assert 0 < largest.bytes <= allowed


# --- the operators ------------------------------------------------------------------------------

MASKS = pytest.mark.parametrize("kind", ["bool", "additive", "learned"])


def mask_of(kind: str) -> Tensor:
    if kind == "bool":
        return visible("left padding", B, HQ, T)
    return random_bias(1, HQ, T, T, dtype=torch.float32).requires_grad_(kind == "learned")


@MASKS
@pytest.mark.parametrize("slots", [0, 2])
def test_opcheck_attention(kind: str, slots: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(s=slots, dtype=torch.float32)]
    opcheck(OPS.attention.default, (*tensors, False, 0.25, mask_of(kind)))


@MASKS
@pytest.mark.parametrize("slots", [0, 2])
def test_opcheck_backwards(kind: str, slots: int) -> None:
    tensors = inputs(s=slots, dtype=torch.float32)
    mask, learned = mask_of(kind).detach(), kind == "learned"
    out, lse = moda(*tensors, is_causal=False, attn_mask=mask)
    grad = layouts(torch.randn_like(out))["token major"]
    rest = (False, 0.25, mask, learned)
    opcheck(OPS.attention_backward.default, (grad, *tensors, out, lse, *rest))
    q, k, v, keys, values = *tensors[:3], list(tensors[3]), list(tensors[4])
    accumulator = ops.new_accumulator(k, k.shape, slots + 1, torch.float32) if slots else None
    arguments = (grad, q, k, v, keys, values, out, lse, accumulator, *rest)
    opcheck(OPS.depth_attention_backward.default, arguments)
    dmask = OPS.depth_attention_backward(*arguments)[3]
    assert dmask.shape == (mask.shape if learned else (0,))


@MASKS
def test_opcheck_forwards(kind: str) -> None:
    q, k, v, depth_k, depth_v = inputs(dtype=torch.float32)
    slots = list(depth_k), list(depth_v)
    mask = mask_of(kind)
    opcheck(OPS.depth_attention.default, (q, k, v, *slots, False, 0.25, mask.detach()))
    for x in (q, k, v):
        x.requires_grad_()
    token = OPS.write_slot(None, k.detach(), v.detach(), 0, 3, torch.float32).requires_grad_()
    opcheck(OPS.attend.default, (q, k, v, token, *slots, False, 0.25, mask))


@pytest.mark.parametrize("learned", [False, True])
def test_attend_with_a_mask(learned: bool) -> None:
    """As the rewritten model calls it: the mask's gradient, and the slots' through the token."""
    layers = [[x.requires_grad_() for x in inputs(seed=i)[:3]] for i in range(3)]
    bias = random_bias(1, HQ, T, T).requires_grad_(learned)
    leaves = [x for layer in layers for x in layer] + ([bias] if learned else [])
    token, keys, values, outs = None, [], [], []
    for i, (q, k, v) in enumerate(layers):
        depth = list(keys), list(values)
        if i < 2:
            token = OPS.write_slot(token, k, v, i, 2, torch.float64)
            keys.append(k)
            values.append(v)
        out, token = OPS.attend(q, k, v, token, *depth, False, 0.25, bias)
        outs.append(out)
    expected = []
    for i, (q, k, v) in enumerate(layers):
        slots = [
            torch.stack([x[j] for x in layers[:i]]) if i else k.new_empty(0, *k.shape)
            for j in (1, 2)
        ]
        expected.append(moda_attention_reference(q, k, v, *slots, attn_mask=bias, scale=0.25)[0])
    got = torch.autograd.grad(sum(x.sin().sum() for x in outs), leaves)
    right = torch.autograd.grad(sum(x.sin().sum() for x in expected), leaves)
    for x, y in zip(got, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)  # a few dozen float64 roundings


def test_compiled_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moda, dynamic=True, fullgraph=True, backend=counter)
    for b, t in ((5, 7), (6, 12), (9, 33)):  # no two axes alike: Dynamo would tie them
        tensors = make(b=b, t=t)
        mask = random_bias(1, HQ, t, t).requires_grad_()
        got = run(compiled, tensors, is_causal=False, attn_mask=mask)
        expected = run(moda, tensors, is_causal=False, attn_mask=mask)
        for x, y in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 1


def test_without_autograd() -> None:
    tensors, mask = inputs(), visible("packed", B, HQ, T)
    expected = moda_attention(*tensors, is_causal=False, attn_mask=mask)
    with torch.inference_mode():
        got = moda_attention(*tensors, is_causal=False, attn_mask=mask)
        token = OPS.write_slot(None, *tensors[1:3], 0, 3, torch.float64)
        slots = list(tensors[3]), list(tensors[4])
        out, _ = OPS.attend(*tensors[:3], token, *slots, False, 0.25, mask)
    assert torch.equal(got, expected)
    assert torch.equal(out, expected)  # 0.25 is the default scale of head_dim 16


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True]], "attn_mask: got list, expected a tensor"),
        (torch.zeros(T, T, dtype=torch.int64), "attn_mask: got torch.int64, expected torch.bool"),
        (torch.zeros(T, T, dtype=torch.complex64), "attn_mask: got torch.complex64"),
        (torch.zeros(T, T, device="meta"), "attn_mask: on meta, but q is on cpu"),
        (torch.zeros(T, T + 1), r"got \(11, 12\), .* \[2, 4, 11, 11\]"),
        (torch.zeros(2, T, T), r"attn_mask: got \(2, 11, 11\)"),
        (torch.zeros(3, 1, T, T), r"attn_mask: got \(3, 1, 11, 11\)"),
        (torch.zeros(1, B, HQ, T, T), r"attn_mask: got \(1, 2, 4, 11, 11\)"),
        (torch.zeros(0), r"attn_mask: got \(0,\)"),
    ],
    ids=str,
)
def test_bad_masks(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        moda_attention(*inputs(), is_causal=False, attn_mask=mask)


def test_a_mask_and_causality_exclude_each_other() -> None:
    mask = torch.ones(T, T, dtype=torch.bool)
    with pytest.raises(InputError, match="both is_causal=True and attn_mask"):
        moda_attention(*inputs(), is_causal=True, attn_mask=mask)
    q, k, v, depth_k, depth_v = inputs()
    with pytest.raises(InputError, match="both is_causal=True and a mask"):
        OPS.depth_attention(q, k, v, list(depth_k), list(depth_v), True, 0.25, mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(T, T, dtype=torch.int32), "a mask of torch.int32"),
        (torch.zeros(T, T - 1), r"a mask \(11, 10\)"),
        (torch.zeros(1, 1, 1, T, T), r"a mask \(1, 1, 1, 11, 11\)"),
    ],
    ids=str,
)
def test_the_inner_operators_refuse_what_would_read_out_of_bounds(
    mask: Tensor, message: str
) -> None:
    q, k, v, depth_k, depth_v = inputs()
    rest = (list(depth_k), list(depth_v))
    with pytest.raises(InputError, match=message):
        OPS.depth_attention(q, k, v, *rest, False, 0.25, mask)


def test_what_a_mask_leaves_may_be_given() -> None:
    """`passes.visible` does; on a CPU it changes nothing."""
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    seen = torch.tensor([[[0, 8, 9]]], dtype=torch.int32)
    call = partial(OPS.depth_attention, q, k, k, [], [], False, 0.25)
    assert torch.equal(call(mask, seen)[0], call(mask)[0])
    for wrong in (seen[0], seen.repeat(1, 1, 2), seen.repeat(3, 1, 1), seen.long()):
        with pytest.raises(InputError, match="seen"):
            call(mask, wrong)
    with pytest.raises(InputError, match="a mask's visible_keys"):
        call(None, seen)
    with pytest.raises(InputError, match="on a GPU"):
        OPS.visible_keys(mask, 1, 1)
