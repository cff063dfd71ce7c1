"""A backward pass that leaves the slots' gradients out, and the operator that gathers them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moda_compile import InputError, ops
from moda_compile.testing import moda_attention_reference
from tests.op_cases import layouts, make

OPS = torch.ops.moda_compile
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.25


def backward_arguments(dtype: torch.dtype, **sizes: int) -> tuple[Any, ...]:
    """grad_out, q, k, v, keys, values, out, lse of one attention."""
    q, k, v, depth_k, depth_v = make(dtype=dtype, **sizes)
    keys, values = list(depth_k), list(depth_v)
    out, lse = OPS.depth_attention(q, k, v, keys, values, True, SCALE)
    return torch.randn_like(out), q, k, v, keys, values, out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_rest_of_backward_is_the_same(dtype: torch.dtype, masked: bool) -> None:
    saved = backward_arguments(dtype)
    mask = torch.randn(2, 1, 7, 7).to(dtype) if masked else None
    if masked:
        saved = (*saved[:6], *OPS.depth_attention(*saved[1:6], False, SCALE, mask))
    accumulator = ops.new_accumulator(saved[2], saved[2].shape, 3, torch.float64)
    rest = (not masked, SCALE, mask, masked)
    expected = OPS.depth_attention_backward(*saved, accumulator, *rest)
    *got, delta = OPS.depth_attention_query_backward(*saved, *rest)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    grad, out, lse = saved[0], saved[6], saved[7]
    torch.testing.assert_close(delta, (grad.to(lse.dtype) * out).sum(-1))
    assert delta.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_it_is_behind_a_merge(dtype: torch.dtype) -> None:
    grad, q, k, v, keys, values, *_ = backward_arguments(dtype)
    own = OPS.depth_attention(q, k, v, [], [], True, SCALE)
    out, lse = OPS.depth_merge(*own, q, keys, values, SCALE)
    accumulator = ops.new_accumulator(k, k.shape, 3, torch.float64)
    saved = (grad, *own, q, keys, values, out, lse)
    expected = OPS.depth_merge_backward(*saved, accumulator, SCALE)
    *got, delta = OPS.depth_merge_query_backward(*saved, SCALE)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    torch.testing.assert_close(delta, (grad.to(lse.dtype) * out).sum(-1))


def layers(
    readers: tuple[int, ...], dtype: torch.dtype, kind: str | None = None, **sizes: int
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments of depth_gather up to readers, and the exact gradients of keys and of values."""

    def laid_out(x: Tensor) -> Tensor:
        return x if kind is None else layouts(x)[kind]

    *_, depth_k, depth_v = make(s=len(readers), dtype=dtype, **sizes)
    slots = torch.stack([depth_k, depth_v]).double()
    total, saved = torch.zeros_like(slots), []
    for number in range(max(readers)):
        q, k, v, *_ = make(dtype=dtype, seed=number + 1, **sizes)
        seen = sum(number < count for count in readers)
        leaves = slots[:, :seen].clone().requires_grad_()
        wide = [x.double() for x in (q, k, v)]
        out, lse = moda_attention_reference(*wide, *leaves, scale=SCALE)
        generator = torch.Generator().manual_seed(number)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
        total[:, :seen] += torch.autograd.grad(out, leaves, grad.double())[0]
        delta = (grad.double() * out.detach()).sum(-1)
        wide_dtype = torch.promote_types(dtype, torch.float32)
        saved.append(
            (laid_out(grad), laid_out(q), lse.detach().to(wide_dtype), delta.to(wide_dtype))
        )
    keys, values = ([laid_out(x) for x in side] for side in (depth_k, depth_v))
    made = (*map(list, zip(*saved, strict=True)), keys, values, list(readers))
    return made, list(total)


def check(readers: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
    arguments, exact = layers(readers, dtype, **options)
    for made_in in (dtype, torch.promote_types(dtype, torch.float32)):
        got, rest = OPS.depth_gather(*arguments, SCALE, made_in, [])
        assert rest.shape == (0, *got.shape[1:])
        assert got.dtype == made_in
        assert got.transpose(3, 4).is_contiguous()
        # lse and delta come rounded, so p and dz are off by a few units of them; then one rounding.
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        for side in (0, 1):
            most = exact[side].abs().max().item() if exact[side].numel() else 0.0
            limit = (64 * wide + torch.finfo(made_in).eps) * max(most, 1.0)
            torch.testing.assert_close(got[:, side].double(), exact[side], rtol=0.0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("readers", [(1,), (4, 3), (2, 2, 1), (3, 0)], ids=str)
def test_against_the_oracle(readers: tuple[int, ...], dtype: torch.dtype) -> None:
    check(readers, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_starts_are_added_to(dtype: torch.dtype) -> None:
    arguments, exact = layers((3, 2), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    plain, _ = OPS.depth_gather(*arguments, SCALE, wide, [])
    generator = torch.Generator().manual_seed(9)
    shape = exact[0].shape[1:]
    key, value = (torch.randn(shape, generator=generator).to(wide) for _ in range(2))
    key = key.transpose(1, 2).contiguous().transpose(1, 2)  # of any strides
    made, _ = OPS.depth_gather(*arguments, SCALE, wide, [key, None, None, value])
    torch.testing.assert_close(made[0, 0], plain[0, 0] + key)
    torch.testing.assert_close(made[1, 1], plain[1, 1] + value)
    assert torch.equal(made[0, 1], plain[0, 1])
    assert torch.equal(made[1, 0], plain[1, 0])


def in_two_calls(
    arguments: tuple[Any, ...], unfinished: int, dtype: torch.dtype, starts: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the last slots, from the readers of these, and of the first `unfinished` ones,
    from the sums of that call and the readers that are left; and the sums.

    starts: of all slots' keys and values.
    """
    *readers, keys, values, counts = arguments
    ran = counts[unfinished]
    early, late = [x[:ran] for x in readers], [x[ran:] for x in readers]
    turned = [side[unfinished:] + side[:unfinished] for side in (keys, values)]
    seen = [*counts[unfinished:], *[ran] * unfinished]
    own = starts[2 * unfinished :]
    made, sums = OPS.depth_gather(*early, *turned, seen, SCALE, dtype, own, unfinished=unfinished)
    begun = [side[:unfinished] for side in (keys, values)]
    missing = [count - ran for count in counts[:unfinished]]
    rest = starts[: 2 * unfinished]
    whole, nothing = OPS.depth_gather(*late, *begun, missing, SCALE, dtype, rest, sums)
    assert len(nothing) == 0
    return made, whole, sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("readers", "unfinished"), [((6, 5, 4, 3), 2), ((3, 2), 1), ((5, 4, 4), 1)], ids=str
)
def test_sums_go_on_in_another_call(
    dtype: torch.dtype, readers: tuple[int, ...], unfinished: int
) -> None:
    arguments, _ = layers(readers, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(9)
    key, value = (
        torch.randn(arguments[4][0].shape, generator=generator).to(dtype) for _ in range(2)
    )
    nothing = [None, None] * (len(readers) - 2)
    for made_in in (dtype, wide):
        starts = [key.to(made_in), None, *nothing, None, value.to(made_in)]
        expected, _ = OPS.depth_gather(*arguments, SCALE, made_in, starts)
        made, whole, sums = in_two_calls(arguments, unfinished, made_in, starts)
        assert (sums.dtype, made.dtype, whole.dtype) == (wide, made_in, made_in)
        for got in (made, whole, sums):
            assert got.transpose(3, 4).is_contiguous()
        assert torch.equal(made, expected[unfinished:])
        # The same sums in the same order: nothing has been rounded on the way.
        assert torch.equal(whole, expected[:unfinished])


def test_sums_of_keys_have_no_scale_yet() -> None:
    arguments, exact = layers((2, 1), torch.float64)
    _, _, sums = in_two_calls(arguments, 1, torch.float64, [None] * 4)
    *readers, keys, values, _ = arguments
    only = [side[:1] for side in readers], [side[:1] for side in (keys, values)]
    first, _ = OPS.depth_gather(*only[0], *only[1], [1], SCALE, torch.float64, [])
    torch.testing.assert_close(sums[:, 0] * SCALE, first[:, 0])
    assert torch.equal(sums[:, 1], first[:, 1])


def test_partial_sums_of_any_strides() -> None:
    arguments, _ = layers((4, 3), torch.float32)
    generator = torch.Generator().manual_seed(9)
    shape = (2, 2, *arguments[4][0].shape)
    partials = torch.randn(shape, generator=generator)
    rest = (SCALE, torch.float32, [])
    expected, _ = OPS.depth_gather(*arguments, *rest, partials)
    other = partials.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    assert not torch.equal(expected, OPS.depth_gather(*arguments, *rest)[0])
    assert torch.equal(expected, OPS.depth_gather(*arguments, *rest, other)[0])


def test_sums_of_another_form() -> None:
    arguments, _ = layers((3, 2), torch.float32)
    *readers, keys, values, counts = arguments
    sums = torch.zeros(2, 2, *keys[0].shape)
    for partials, unfinished, message in (
        (sums[:1], 0, "got partial sums"),
        (sums[..., :2], 0, "got partial sums"),
        (sums.double(), 0, "of torch.float64, expected"),
        (None, 2, "2 of them unfinished"),
        (None, -1, "-1 of them unfinished"),
    ):
        with pytest.raises(InputError, match=message):
            OPS.depth_gather(*arguments, SCALE, torch.float32, [], partials, unfinished)
    five = (*readers, [keys[0]] * 5, [values[0]] * 5, [1] * 5)
    with pytest.raises(InputError, match="got 5 slots, 0 of them unfinished; expected at most 4"):
        OPS.depth_gather(*five, SCALE, torch.float32, [])
    with pytest.raises(InputError, match="got 4 starts for 1 finished slots"):
        OPS.depth_gather(*arguments, SCALE, torch.float32, [None] * 4, None, 1)


def test_starts_of_another_form() -> None:
    arguments, _ = layers((3, 2), torch.float32)
    key = arguments[4][0]
    for starts, message in (
        ([key], "got 1 starts for 2 finished slots"),
        ([key[..., :2], None, None, None], "got a start"),
        ([key.double(), None, None, None], "of torch.float64, expected"),
    ):
        with pytest.raises(InputError, match=message):
            OPS.depth_gather(*arguments, SCALE, torch.float32, starts)


@pytest.mark.parametrize("kind", ["reversed", "every second", "token major", "offset"])
def test_any_strides(kind: str) -> None:
    check((3, 2), torch.float32, kind=kind)


@pytest.mark.parametrize(("hk", "groups", "d"), [(1, 1, 5), (3, 1, 76), (1, 5, 16), (2, 4, 70)])
def test_groups_and_head_dims(hk: int, groups: int, d: int) -> None:
    check((2, 1), torch.float64, hk=hk, groups=groups, d=d, t=5)


@pytest.mark.parametrize("sizes", [{"b": 0}, {"t": 0}], ids=str)
def test_empty(sizes: dict[str, int]) -> None:
    q, k, *_ = make(dtype=torch.float32, **sizes)
    rest = (q[..., 0], q[..., 0])
    made, _ = OPS.depth_gather(*([x] for x in (q, q, *rest, k, k)), [1], SCALE, torch.float32, [])
    assert made.shape == (1, 2, *k.shape)
    saved = (q, q, k, k, [k], [k], q, q[..., 0])
    *_, delta = OPS.depth_attention_query_backward(*saved, True, SCALE)
    assert delta.shape == q.shape[:3]
    merged = OPS.depth_merge_query_backward(q, q, q[..., 0], q, [k], [k], q, q[..., 0], SCALE)
    assert [x.shape for x in merged] == [q.shape, q.shape[:3], q.shape, q.shape[:3]]


def test_opcheck() -> None:
    arguments, _ = layers((2, 1), torch.float32, kind="token major")
    opcheck(OPS.depth_gather.default, (*arguments, SCALE, torch.bfloat16, []))
    _, sums = OPS.depth_gather(*arguments, SCALE, torch.bfloat16, [], None, 1)
    sums = sums.repeat(2, 1, 1, 1, 1, 1)
    opcheck(OPS.depth_gather.default, (*arguments, SCALE, torch.bfloat16, [], sums, 1))
    saved = backward_arguments(torch.bfloat16)
    opcheck(OPS.depth_attention_query_backward.default, (*saved, True, SCALE))
    grad, q, _, _, keys, values, out, lse = saved
    opcheck(
        OPS.depth_merge_query_backward.default,
        (grad, out, lse, q, keys, values, out, lse, SCALE),
    )


def changed(place: int, value: Any) -> Any:
    arguments, _ = layers((2, 1), torch.float32)
    return tuple(value(x) if i == place else x for i, x in enumerate(arguments))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, lambda x: x[:1], "got 1 output gradients, 2 queries"),
        (1, lambda x: [y[:, :3] for y in x], "3 heads are no multiple of 2"),
        (1, lambda x: [y[..., :8] for y in x], "queries or output gradients"),
        (2, lambda x: [y[..., :2] for y in x], "lse or delta"),
        (4, lambda x: x[:1], "got 1 keys, 2 values"),
        (4, lambda x: [], "no depth slots"),
        (5, lambda x: [y[..., :8] for y in x], "keys or values"),
        (5, lambda x: [y.double() for y in x], "differ in dtype or device"),
        (6, lambda x: [3, 1], "at most 2 readers"),
        (6, lambda x: [2], "readers"),
    ],
)  # fmt: skip
def test_what_can_not_be_gathered(place: int, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OPS.depth_gather(*changed(place, value), SCALE, torch.float32, [])


def test_without_slots_nothing_is_left_out() -> None:
    grad, q, k, v, _, _, out, lse = backward_arguments(torch.float32)
    with pytest.raises(InputError, match="no depth slots"):
        OPS.depth_attention_query_backward(grad, q, k, v, [], [], out, lse, True, SCALE)
    with pytest.raises(InputError, match="no depth slots"):
        OPS.depth_merge_query_backward(grad, out, lse, q, [], [], out, lse, SCALE)
