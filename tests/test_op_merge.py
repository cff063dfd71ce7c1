"""Depth slots merged into an attention that something else computed, through its log-sum-exp."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moda_compile import InputError, ops
from moda_compile.testing import moda_attention_reference
from tests.op_cases import compare, layouts, make, run, visible

OPS = torch.ops.moda_compile
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.25


def sequence_part(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """An attention that tells its lse, as FlexAttention does; 0 and -inf in rows without a key."""
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    query, key, value = q.to(wide), *(x.to(wide).repeat_interleave(groups, 1) for x in (k, v))
    z = query @ key.mT * scale
    if mask is not None:
        z = z.masked_fill(~mask, -math.inf)
    dead = (z == -math.inf).all(-1, keepdim=True)
    p = z.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    lse = z.masked_fill(dead, 0.0).logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf)
    return (p @ value).to(q.dtype), lse


def joined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth_k: Tensor,
    depth_v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float = SCALE,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The whole attention: its own sequence part, then `join`; slots as a rewritten model has."""
    out, lse = sequence_part(q, k, v, attn_mask, scale)
    keys, values = list(depth_k.unbind(0)), list(depth_v.unbind(0))
    token = None
    for i, pair in enumerate(zip(keys, values, strict=True)):
        token = OPS.write_slot(token, *pair, i, len(keys), dtype)
    joint, _ = OPS.join(out, lse, q, token, keys, values, scale)
    with torch.no_grad():
        return joint, OPS.depth_merge(out, lse, q, keys, values, scale)[1]


def check(tensors: list[Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> None:
    accumulate = ops.accumulator_dtype(tensors[0].dtype, "float32")
    got = run(lambda *x, **y: joined(*x, **y, dtype=accumulate), tensors, **options)
    exact = run(
        moda_attention_reference, [x.double() for x in tensors], **({"scale": SCALE} | options)
    )
    compare(got, exact, tensors[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize("scale", [SCALE, -1.5, 0.0])
def test_against_the_oracle(dtype: torch.dtype, slots: int, scale: float) -> None:
    check(make(s=slots, dtype=dtype), scale=scale)


@pytest.mark.parametrize(("hk", "groups"), [(1, 1), (3, 1), (1, 3), (2, 4)])
@pytest.mark.parametrize("kind", ["causal", "left padding", "packed", "nothing"])
def test_groups_and_rows_without_a_key(hk: int, groups: int, kind: str) -> None:
    tensors = make(hk=hk, groups=groups, t=11)
    check(tensors, attn_mask=visible(kind, 2, hk * groups, 11))


@pytest.mark.parametrize("kind", ["reversed", "every second", "token major", "offset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_strides(kind: str, dtype: torch.dtype) -> None:
    q, k, v, depth_k, depth_v = make(dtype=dtype)
    out, lse = sequence_part(q, k, v, None, SCALE)
    dense = OPS.depth_merge(out, lse, q, list(depth_k), list(depth_v), SCALE)
    grad = torch.randn_like(out)
    strided = [layouts(x)[kind] for x in (out, q, grad, dense[0])]
    slots = [[layouts(x)[kind] for x in y] for y in (depth_k, depth_v)]
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (lse, dense[1])]
    got = OPS.depth_merge(strided[0], turned[0], strided[1], *slots, SCALE)
    accumulators = [ops.new_accumulator(k, k.shape, 3, torch.float64) for _ in range(2)]
    one = OPS.depth_merge_backward(
        grad, out, lse, q, list(depth_k), list(depth_v), *dense, accumulators[0], SCALE
    )
    other = OPS.depth_merge_backward(
        strided[2], strided[0], turned[0], strided[1], *slots, strided[3], turned[1],
        accumulators[1], SCALE,
    )  # fmt: skip
    eps = torch.finfo(dtype).eps  # sums over head_dim in another order
    for x, y in zip((*got, *other, accumulators[1]), (*dense, *one, accumulators[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=4 * eps, atol=4 * eps * y.abs().max().item())
    assert all(x.transpose(1, 2).is_contiguous() for x in (got[0], other[0], other[2]))
    assert got[1].is_contiguous()
    assert other[1].is_contiguous()


@pytest.mark.parametrize("sizes", [{"b": 0}, {"t": 0}], ids=str)
def test_empty(sizes: dict[str, int]) -> None:
    q, _, _, depth_k, depth_v = make(**sizes)
    slots = list(depth_k), list(depth_v)
    out, lse = OPS.depth_merge(q, q[..., 0], q, *slots, SCALE)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    accumulator = ops.new_accumulator(slots[0][0], slots[0][0].shape, 3, torch.float64)
    made = OPS.depth_merge_backward(q, q, lse, q, *slots, out, lse, accumulator, SCALE)
    assert [x.shape for x in made] == [q.shape, q.shape[:3], q.shape]


def test_the_gradient_of_the_lse() -> None:
    """The sequence's lse is an input like any other: checked alone, by finite differences."""
    q, k, v, depth_k, depth_v = make(b=1, t=3, d=4)
    out, lse = sequence_part(q, k, v, None, SCALE)
    token = OPS.write_slot(None, depth_k[0], depth_v[0], 0, 3, torch.float64)
    slots = list(depth_k), list(depth_v)

    def function(out: Tensor, lse: Tensor, q: Tensor) -> Tensor:
        joint: Tensor = OPS.join(out, lse, q, token, *slots, SCALE)[0]
        return joint

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (out, lse, q)])


def test_the_accumulator_is_added_to_and_rows_behind_it_are_not_touched() -> None:
    q, k, v, depth_k, depth_v = make()
    out, lse = sequence_part(q, k, v, None, SCALE)
    slots = list(depth_k), list(depth_v)
    joint, joint_lse = OPS.depth_merge(out, lse, q, *slots, SCALE)

    def backward(accumulator: Tensor) -> Tensor:
        arguments = (joint, out, lse, q, *slots, joint, joint_lse, accumulator, SCALE)
        OPS.depth_merge_backward(*arguments)
        return accumulator

    alone = backward(ops.new_accumulator(k, k.shape, 3, torch.float64))
    before = ops.new_accumulator(k, k.shape, 5, torch.float64)
    before[:3], before[3:] = 3.0, math.nan
    after = backward(before)
    torch.testing.assert_close(after[:3], alone + 3.0, rtol=0, atol=1e-14)  # one addition
    assert after[3:].isnan().all()


@pytest.mark.parametrize("used", [[0, 1, 2, 3], [3], [1], [0, 2]], ids=str)
@pytest.mark.parametrize("joins", [{1, 2, 3}, {2}, {3}, {1}], ids=str)
def test_attend_and_join_in_one_stack(used: list[int], joins: set[int]) -> None:
    """Whichever layers join, and whichever the loss looks at, the token carries all gradients."""
    layers = [[x.requires_grad_() for x in make(seed=i)[:3]] for i in range(4)]
    leaves = list(itertools.chain(*layers))
    token, keys, values, outs, expected = None, [], [], [], []
    for i, (q, k, v) in enumerate(layers):
        depth = list(keys), list(values)
        if i < 3:
            token = OPS.write_slot(token, k, v, i, 3, torch.float64)
            keys.append(k)
            values.append(v)
        if i in joins:
            own = sequence_part(q, k, v, None, SCALE)
            out, token = OPS.join(*own, q, token, *depth, SCALE)
        else:
            out, token = OPS.attend(q, k, v, token, *depth, False, SCALE)
        outs.append(out)
        stacks = [torch.stack(x) if x else k.new_empty(0, *k.shape) for x in depth]
        expected.append(moda_attention_reference(q, k, v, *stacks, scale=SCALE)[0])

    def gradients(found: list[Tensor]) -> list[Tensor]:
        loss = sum(found[i].sin().sum() * (i + 1) for i in used)
        made = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(made, leaves, strict=True)]

    for x, y in zip(gradients(outs), gradients(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)  # a few dozen float64 roundings


# FlexAttention, uncompiled, says that it is slow. On a CPU it has no backward: that part is
# checked by benchmarks/check_gpu.py.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("start", [0, 4])
def test_with_the_lse_of_flex_attention(start: int) -> None:
    """It is a natural logarithm, and with start > 0 some rows see no key at all."""
    q, k, v, depth_k, depth_v = make(t=9, dtype=torch.float32)

    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + 0.1 * (j - i)

    def visible_key(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= start)

    block = create_block_mask(visible_key, 2, None, 9, 9, device="cpu")
    own = flex_attention(
        q, k, v, bias, block_mask=block, scale=SCALE, enable_gqa=True, return_lse=True
    )
    slots = list(depth_k), list(depth_v)
    got, lse = OPS.depth_merge(*own, q, *slots, SCALE)
    row, column = torch.arange(9)[:, None], torch.arange(9)[None, :]
    added = (0.1 * (column - row)).double()
    added = added.masked_fill(~((column <= row) & (column >= start)), -math.inf)
    wide = [x.double() for x in (q, k, v, depth_k, depth_v)]
    exact, exact_lse = moda_attention_reference(*wide, attn_mask=added, scale=SCALE)
    compare((got.double(), lse.double(), []), (exact, exact_lse, []), torch.float32)


# --- the operators ------------------------------------------------------------------------------


def arguments(kind: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """sequence_out, sequence_lse, q, depth_k, depth_v, with a row that sees no key."""
    q, k, v, depth_k, depth_v = make(dtype=dtype)
    out, lse = sequence_part(q, k, v, visible("left padding", 2, 4, 7), SCALE)
    tensors = [out, lse, q, *depth_k, *depth_v]
    if kind != "dense":
        tensors = [layouts(x)[kind] if x.dim() == 4 else x for x in tensors]
    return [*tensors[:3], tensors[3:6], tensors[6:]]


@pytest.mark.parametrize("kind", ["dense", "token major", "reversed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    out, lse, q, keys, values = arguments(kind, dtype)
    opcheck(OPS.depth_merge.default, (out, lse, q, keys, values, SCALE))
    joint, joint_lse = OPS.depth_merge(out, lse, q, keys, values, SCALE)
    accumulator = ops.new_accumulator(keys[0], keys[0].shape, 4, torch.float32)
    grad = torch.randn_like(joint)
    opcheck(
        OPS.depth_merge_backward.default,
        (grad, out, lse, q, keys, values, joint, joint_lse, accumulator, SCALE),
    )


@pytest.mark.parametrize("kind", ["dense", "token major"])
def test_opcheck_join(kind: str) -> None:
    out, lse, q, keys, values = arguments(kind)
    token = OPS.write_slot(None, keys[0], values[0], 0, 3, torch.float32).requires_grad_()
    for x in (out, lse, q):
        x.requires_grad_()
    opcheck(OPS.join.default, (out, lse, q, token, keys, values, SCALE))


def test_compiled_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(joined, dynamic=True, fullgraph=True, backend=counter)
    compilations = set()
    for b, t in ((5, 7), (6, 12), (9, 33)):  # no two axes alike: Dynamo would tie them
        tensors = make(b=b, t=t)
        got, expected = run(compiled, tensors), run(joined, tensors)
        for x, y in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
            # The sequence part is decomposed by AOTAutograd: a few roundings.
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # the first call may start over, as `scale` turns out constant


def test_without_autograd() -> None:
    out, lse, q, keys, values = arguments("dense")
    expected, _ = OPS.depth_merge(out, lse, q, keys, values, SCALE)
    with torch.inference_mode():
        token = OPS.write_slot(None, keys[0], values[0], 0, 3, torch.float32)
        assert torch.equal(OPS.join(out, lse, q, token, keys, values, SCALE)[0], expected)


def test_double_backward_is_refused() -> None:
    out, lse, q, keys, values = arguments("dense")
    q.requires_grad_()
    token = OPS.write_slot(None, keys[0], values[0], 0, 3, torch.float32)
    joint, _ = OPS.join(out, lse, q, token, keys, values, SCALE)
    (gradient,) = torch.autograd.grad(joint.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[:, :1], r"a sequence part \(2, 1, 7, 16\)"),
        (0, lambda x: x[..., :8], r"a sequence part \(2, 4, 7, 8\)"),
        (1, lambda x: x[..., :6], r"with an lse \(2, 4, 6\)"),
        (2, lambda x: x[:, :3], "3 heads are no multiple of 2"),
        (3, lambda x: [], "no depth slots"),
        (3, lambda x: x[:2], "2 depth keys but 3 depth values"),
        (4, lambda x: [*x[:2], x[2][:, :1]], r"got depth keys or values \(2, 1, 7, 16\)"),
        (3, lambda x: [x[0][:, :, :6], *x[1:]], "expected"),
    ],
)
def test_what_is_refused(index: int, change: Any, message: str) -> None:
    given = arguments("dense")
    given[index] = change(given[index])
    with pytest.raises(InputError, match=message):
        OPS.depth_merge(*given, SCALE)
