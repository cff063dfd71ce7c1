"""The registered operators: torch.library.opcheck, autograd over many layers, torch.compile."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from moda_compile import InputError, MoDAConfig, NotRewrittenError, moda_attention, ops, stacked
from moda_compile.markers import Spec
from moda_compile.testing import moda_attention_reference
from tests.op_cases import compare, layouts, make, moda, run

OPS = torch.ops.moda_compile
assert stacked.attention  # imported: this module's operators are registered at first use


# --- the dispatcher -----------------------------------------------------------------------------


def strided(tensors: list[Tensor], kind: str, requires_grad: bool = True) -> list[Tensor]:
    found = tensors if kind == "dense" else [layouts(x)[kind] for x in tensors]
    return [x.detach().requires_grad_(requires_grad) for x in found]


KINDS = pytest.mark.parametrize("kind", ["dense", "token major", "reversed"])
SLOTS = pytest.mark.parametrize("slots", [0, 2])


@KINDS
@SLOTS
def test_opcheck_attention(kind: str, slots: int) -> None:
    tensors = strided(make(s=slots, dtype=torch.float32), kind)
    opcheck(OPS.attention.default, (*tensors, True, 0.25))


@KINDS
@SLOTS
def test_opcheck_attention_backward(kind: str, slots: int) -> None:
    tensors = strided(make(s=slots, dtype=torch.float32), kind, requires_grad=False)
    out, lse = moda(*tensors, is_causal=True)
    grad = layouts(torch.randn_like(out))["token major"]
    opcheck(OPS.attention_backward.default, (grad, *tensors, out, lse, True, 0.25))


@KINDS
@SLOTS
def test_opcheck_depth_attention(kind: str, slots: int) -> None:
    q, k, v, depth_k, depth_v = strided(
        make(s=slots, dtype=torch.float32), kind, requires_grad=False
    )
    opcheck(OPS.depth_attention.default, (q, k, v, list(depth_k), list(depth_v), False, 0.25))


@KINDS
@SLOTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_depth_attention_backward(kind: str, slots: int, dtype: torch.dtype) -> None:
    q, k, v, depth_k, depth_v = strided(make(s=slots, dtype=dtype), kind, requires_grad=False)
    keys, values = list(depth_k), list(depth_v)
    out, lse = OPS.depth_attention(q, k, v, keys, values, True, 0.25)
    accumulator = ops.new_accumulator(k, k.shape, slots + 1, torch.float32) if slots else None
    opcheck(
        OPS.depth_attention_backward.default,
        (torch.randn_like(out), q, k, v, keys, values, out, lse, accumulator, True, 0.25),
    )


@KINDS
@SLOTS
def test_opcheck_attend(kind: str, slots: int) -> None:
    q, k, v, depth_k, depth_v = strided(
        make(s=slots, dtype=torch.float32), kind, requires_grad=False
    )
    for x in (q, k, v):
        x.requires_grad_()
    token = OPS.write_slot(None, k.detach(), v.detach(), 0, 3, torch.float32).requires_grad_()
    opcheck(OPS.attend.default, (q, k, v, token, list(depth_k), list(depth_v), True, 0.25))


@KINDS
@pytest.mark.parametrize("first", [True, False])
def test_opcheck_write_slot(kind: str, first: bool) -> None:
    _, key, value, *_ = strided(make(dtype=torch.bfloat16), kind)
    token = None
    if not first:
        token = torch.zeros((), dtype=torch.float32).expand(3, 2, *key.shape).requires_grad_()
    opcheck(OPS.write_slot.default, (token, key, value, 1, 3, torch.float32))


def test_mark_has_a_fake_and_a_gradient_but_no_kernel() -> None:
    """opcheck runs an operator for real, and this one refuses to; so its parts are looked at."""
    text = Spec(
        block="layers.0", config=MoDAConfig(), attentions=2, strict=True, ffn=False
    ).to_json()
    x = torch.randn(2, 3, 4).transpose(0, 1).requires_grad_()
    for arguments in ((x, [], text), (x.detach(), [x], text)):
        with pytest.raises(NotRewrittenError, match="layers.0"):
            OPS.mark(*arguments)
    with torch.inference_mode(), pytest.raises(NotRewrittenError, match="layers.0"):
        OPS.mark(x, [], text)
    dense = x.detach()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(dense).requires_grad_()
        weight = torch.empty(5, 4, requires_grad=True)
        out = OPS.mark(fake, [weight], text)
        assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), x.dtype)
        (gradient,) = torch.autograd.grad(out, fake, torch.ones_like(out))
        assert gradient.shape == x.shape
    assert str(OPS.mark.default._schema).endswith(
        "(Tensor x, Tensor[] weights, str spec) -> Tensor"
    )


def test_double_backward_is_refused() -> None:
    tensors = [x.requires_grad_() for x in make()]
    out = moda_attention(*tensors, is_causal=True)
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        gradient.sum().backward()


def test_double_backward_of_a_rewritten_model_is_refused() -> None:
    q, k, v, depth_k, depth_v = make()
    q.requires_grad_()
    token = OPS.write_slot(None, k, v, 0, 3, torch.float64)
    out, _ = OPS.attend(q, k, v, token, list(depth_k), list(depth_v), True, 0.25)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- a rewritten model's operators in eager autograd --------------------------------------------


def stack(tensors: list[list[Tensor]], *, dtype: torch.dtype) -> list[Tensor]:
    """A rewritten model's layers: layer l reads the slots that layers < l wrote."""
    token, keys, values, outs = None, [], [], []
    for layer, (q, k, v) in enumerate(tensors):
        depth = list(keys), list(values)
        if layer < len(tensors) - 1:
            token = OPS.write_slot(token, k, v, layer, len(tensors) - 1, dtype)
            keys.append(k)
            values.append(v)
        out, token = OPS.attend(q, k, v, token, *depth, True, 0.25)
        outs.append(out)
    return outs


def stack_reference(tensors: list[list[Tensor]]) -> list[Tensor]:
    outs = []
    for layer, (q, k, v) in enumerate(tensors):
        depth = [
            torch.stack([x[i] for x in tensors[:layer]]) if layer else k.new_empty(0, *k.shape)
            for i in (1, 2)
        ]
        outs.append(moda_attention_reference(q, k, v, *depth, is_causal=True, scale=0.25)[0])
    return outs


@pytest.mark.parametrize("used", [[0, 1, 2, 3], [3], [0], [1], [0, 2], [1, 2]], ids=str)
def test_threaded_gradients(used: list[int]) -> None:
    """Whichever layers the loss looks at, every K and V gets all of its gradient, once."""
    tensors = [[x.requires_grad_() for x in make(seed=i)[:3]] for i in range(4)]
    leaves = list(itertools.chain(*tensors))

    def gradients(outs: list[Tensor]) -> list[Tensor]:
        weights = [torch.sin(torch.arange(outs[0].numel()) + 1.0 + i).double() for i in range(4)]
        loss = sum((outs[i].reshape(-1) * weights[i]).sum() for i in used)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    got = gradients(stack(tensors, dtype=torch.float64))
    expected = gradients(stack_reference(tensors))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)  # a few dozen float64 roundings


@pytest.mark.parametrize("times", [2, 3])
def test_backward_again_through_one_forward(times: int) -> None:
    tensors = [[x.requires_grad_() for x in make(seed=i)[:3]] for i in range(3)]
    leaves = list(itertools.chain(*tensors))[:-1]
    outs = stack(tensors, dtype=torch.float64)
    found = [
        torch.autograd.grad(outs[-1].sum(), leaves, retain_graph=True, allow_unused=True)
        for _ in range(times)
    ]
    for again in found[1:]:
        for x, y in zip(found[0], again, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_threaded_gradients_with_a_frozen_layer(frozen: int) -> None:
    tensors = [[x.requires_grad_(i != frozen) for x in make(seed=i)[:3]] for i in range(3)]
    leaves = [x for layer in tensors for x in layer if x.requires_grad]
    got = torch.autograd.grad(
        sum(x.sin().sum() for x in stack(tensors, dtype=torch.float64)), leaves
    )
    expected = torch.autograd.grad(sum(x.sin().sum() for x in stack_reference(tensors)), leaves)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)  # a few dozen float64 roundings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choice", ["float32", "model"])
def test_accumulator_dtype(dtype: torch.dtype, choice: str) -> None:
    """Either accumulator gives gradients in the model's dtype; the wide one rounds them once."""
    accumulate = ops.accumulator_dtype(dtype, choice)
    assert accumulate == (torch.float32 if choice == "float32" else dtype)
    assert ops.accumulator_dtype(torch.float64, choice) == torch.float64
    tensors = [
        [x.to(dtype).requires_grad_() for x in make(seed=i, dtype=dtype)[:3]] for i in range(4)
    ]
    exact = [[x.detach().double().requires_grad_() for x in layer] for layer in tensors]
    leaves, wide = (list(itertools.chain(*x)) for x in (tensors, exact))
    got = torch.autograd.grad(
        [x.sum() for x in stack(tensors, dtype=accumulate)], leaves, allow_unused=True
    )
    expected = torch.autograd.grad([x.sum() for x in stack_reference(exact)], wide)
    for x, y in zip(got, expected, strict=True):
        assert x is not None
        assert x.dtype == dtype
        # As in `compare`, and one rounding more for each of up to 3 readers.
        bound = 11 * torch.finfo(dtype).eps * max(y.abs().max().item(), 1.0)
        assert (x.double() - y).abs().max().item() <= bound


def test_the_token_takes_no_memory() -> None:
    _, k, v, *_ = make()
    token = OPS.write_slot(None, k, v, 0, 100, torch.float32)
    assert token.shape == (100, 2, *k.shape)
    assert token.untyped_storage().nbytes() == 4


# --- torch.compile ------------------------------------------------------------------------------


def test_compiled_with_dynamic_shapes() -> None:
    """One graph for every B and T, forward and backward, without a graph break."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moda, dynamic=True, fullgraph=True, backend=counter)
    for b, t in ((5, 7), (6, 12), (9, 33)):  # no two axes alike: Dynamo would tie them
        tensors = make(b=b, t=t)
        got = run(compiled, tensors, is_causal=True)
        expected = run(moda, tensors, is_causal=True)
        for x, y in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 1


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(moda, dynamic=True, fullgraph=True)
    for t in (7, 12):
        tensors = make(t=t, dtype=torch.float32)
        got = run(compiled, tensors, is_causal=True)
        expected = run(moda, tensors, is_causal=True)
        compare(got, expected, torch.float32)


def test_compiled_input_errors_stay() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(moda_attention, backend="eager")
    q, *others = make()
    with pytest.raises(InputError, match="not a multiple"):
        compiled(q[:, :3], *others, is_causal=True)


def test_inference_mode_and_no_grad() -> None:
    tensors = make()
    expected = moda_attention(*tensors, is_causal=True)
    with torch.inference_mode():
        assert torch.equal(moda_attention(*tensors, is_causal=True), expected)
        outs = stack([x[:3] for x in (tensors, make(seed=1))], dtype=torch.float64)
    with torch.no_grad():
        again = stack([x[:3] for x in (tensors, make(seed=1))], dtype=torch.float64)
    assert all(torch.equal(x, y) for x, y in zip(outs, again, strict=True))
