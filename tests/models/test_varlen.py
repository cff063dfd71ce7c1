"""Sequences packed into one row (torch.nn.attention.varlen) against running them one by one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moda_compile
from moda_compile import MoDAConfig, NotRewrittenError

varlen = pytest.importorskip("torch.nn.attention.varlen")

HQ, HK, HEAD, WIDTH = 4, 2, 8, 32
# Before torch 2.12 it takes fewer keys than queries without being told.
_OPTIONS = inspect.signature(varlen.varlen_attn).parameters
GROUPED = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}
LENGTHS = (3, 1, 7, 0, 4)


def _parts(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip(ends, ends[1:], strict=False))


def _masked(q: Tensor, k: Tensor, offsets: Tensor, window: Any, scale: float | None) -> Tensor:
    """Scores [Hq, T, T] of all tokens, -inf outside a token's own sequence and window."""
    token = torch.arange(q.shape[0])
    sequence = torch.searchsorted(offsets[1:].long(), token, right=True)
    ahead = token - token[:, None]
    seen = sequence[:, None] == sequence
    left, right = window
    seen &= (ahead >= -left) if left >= 0 else seen
    seen &= (ahead <= right) if right >= 0 else seen
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return (torch.einsum("thd,uhd->htu", q, k) * factor).masked_fill(~seen, -torch.inf)


def _forward(q, k, v, offsets, _1, _2, _3, is_causal=False, scale=None, window=(-1, -1), *_):  # type: ignore[no-untyped-def]
    scores = _masked(q, k, offsets, window, scale)
    y = torch.einsum(
        "htu,uhd->thd", scores.softmax(-1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    )
    return y.contiguous(), scores.logsumexp(-1), torch.zeros(2, dtype=torch.uint64)


def _backward(grad, q, k, v, out, _lse, offsets, _1, _2, _3, _4, _rng, scale=None, window=None):  # type: ignore[no-untyped-def]
    groups = q.shape[1] // k.shape[1]
    p = _masked(q, k, offsets, window or (-1, -1), scale).softmax(-1)
    dp = torch.einsum("thd,uhd->htu", grad, v.repeat_interleave(groups, 1))
    dz = p * (dp - (grad * out).sum(-1).mT[..., None])
    dz = dz * (q.shape[-1] ** -0.5 if scale is None else scale)
    dq = torch.einsum("htu,uhd->thd", dz, k.repeat_interleave(groups, 1))
    dk, dv = (torch.einsum("htu,thd->uhd", x, y) for x, y in ((dz, q), (p, grad)))
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> Iterator[None]:
    """PyTorch's operator, which it has for GPUs only, by T x T scores."""
    library = torch.library.Library("torch_attn", "IMPL", "CPU")
    library.impl("_varlen_attn", _forward)
    library.impl("_varlen_attn_backward", _backward)
    yield
    library._destroy()


class Attention(nn.Module):
    """Given offsets, of sequences packed into x [T, D]; otherwise of one sequence [1, T, D]."""

    def __init__(self, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window
        self.query = nn.Linear(WIDTH, HQ * HEAD)
        self.key = nn.Linear(WIDTH, HK * HEAD)
        self.value = nn.Linear(WIDTH, HK * HEAD)
        self.out = nn.Linear(HQ * HEAD, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, offsets: Tensor | None = None, longest: int = 0) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, HEAD)) for f in (self.query, self.key, self.value))
        if offsets is not None:
            z = varlen.varlen_attn(
                q, k, v, offsets, offsets, longest, longest,
                window_size=self.window, **GROUPED,
            )  # fmt: skip
        else:
            ahead = torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]
            left, right = self.window
            seen = torch.ones_like(ahead, dtype=torch.bool)
            seen = seen & (ahead >= -left) if left >= 0 else seen
            seen = seen & (ahead <= right) if right >= 0 else seen
            q, k, v = (s.transpose(1, 2) for s in (q, k, v))
            z = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)
        return x + self.out(z.flatten(-2))


class Model(nn.Module):
    def __init__(self, window: tuple[int, int] = (-1, 0)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(window) for _ in range(4))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)) for _ in range(4)
        )

    def forward(self, x: Tensor, *offsets: Any) -> Tensor:
        for layer, ffn in zip(self.layers, self.ffn, strict=True):
            x = layer(x, *offsets)
            x = x + ffn(x)
        return x


def packed(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, int]:
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return torch.randn(sum(lengths), WIDTH, dtype=torch.float64), offsets, max(lengths)


@pytest.mark.parametrize(
    ("window", "ffn_kv"),
    [((-1, 0), "none"), ((-1, -1), "projected"), ((2, 0), "shared"), ((1, 2), "none")],
    ids=str,
)
def test_packed_equals_one_by_one(window: tuple[int, int], ffn_kv: Any) -> None:
    torch.manual_seed(0)
    config = MoDAConfig(ffn_kv=ffn_kv)
    plain = Model(window).double()
    x, offsets, longest = packed()
    x.requires_grad_()
    alone = moda_compile.convert(copy.deepcopy(plain), config, (x[None],), backend="eager")
    with torch.no_grad():
        for parameter in alone.parameters():  # new projections start at zero, or small
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model = moda_compile.convert(plain, config, (x, offsets, longest), backend="aot_eager")
    model.load_state_dict(alone.state_dict())
    weight = torch.randn_like(x)

    out = model(x, offsets, longest)
    (out * weight).sum().backward()
    dx, x.grad = x.grad, None
    expected = torch.cat([alone(x[None, a:b])[0] for a, b in _parts(offsets) if b > a])
    (expected * weight).sum().backward()

    tight = dict(rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(out, expected, **tight)
    torch.testing.assert_close(dx, x.grad, **tight)
    for (name, got), (_, wanted) in zip(
        model.named_parameters(), alone.named_parameters(), strict=True
    ):
        torch.testing.assert_close(got.grad, wanted.grad, **tight, msg=name)
    with torch.no_grad():
        assert (out - _unconverted(model, x, offsets, longest)).abs().max() > 1e-3


def _unconverted(model: nn.Module, *args: Any) -> Tensor:
    twin = copy.deepcopy(model)
    moda_compile.revert(twin)
    result: Tensor = twin(*args)
    return result


def test_other_lengths_and_no_tokens_need_no_other_model() -> None:
    torch.manual_seed(0)
    model = moda_compile.convert(Model().double(), example_inputs=packed(), backend="eager")
    alone = copy.deepcopy(model)
    with torch.no_grad():
        for lengths in ((5,), (2, 2, 2, 9), (1, 30)):
            x, offsets, longest = packed(lengths)
            whole = model(x, offsets, longest)
            for a, b in _parts(offsets):
                own = alone(x[a:b], torch.tensor([0, b - a], dtype=torch.int32), b - a)
                torch.testing.assert_close(whole[a:b], own, rtol=1e-10, atol=1e-11)


class Refusing(nn.Module):
    """Two layers of one call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.options = options

    def forward(self, x: Tensor, offsets: Tensor, longest: int) -> Tensor:
        for project in self.project:
            q, k, v = project(x).unflatten(-1, (3, HQ, HEAD)).unbind(-3)
            options = dict(self.options)
            used = options.pop("used", None)
            ends = offsets + 0 if options.pop("other", False) else offsets
            if used is not None:
                options["return_aux"] = varlen.AuxRequest(lse=True)
            y = varlen.varlen_attn(q, k, v, offsets, ends, longest, longest, **options)
            if used is not None:
                y, lse = y
                y = y + lse.mT[..., None]
            x = x + y.flatten(-2)
        return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"used": True}, "lse is used"),
        ({"other": True}, "no attention was found"),
        ({"seqused_k": torch.tensor([3])}, "with seqused_k"),
    ],
    ids=["lse", "cross", "cache"],
)
def test_what_cannot_be_rewritten_is_refused(options: dict[str, Any], message: str) -> None:
    known = {*inspect.signature(varlen.varlen_attn).parameters, "used", "other"}
    if not options.keys() <= known:
        pytest.skip(f"this torch's varlen_attn takes no {', '.join(options.keys() - known)}")
    model = Refusing(**options).double()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    refused = pytest.raises((NotRewrittenError, moda_compile.RewriteError), match=message)
    with torch.no_grad(), refused:  # PyTorch's caches take no gradients
        moda_compile.convert(model, example_inputs=packed(), backend="eager")
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("window", [(-1, 0), (2, 1)], ids=str)
def test_the_operator_and_its_gradients(dtype: torch.dtype, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    shapes = [(8, HQ, HEAD), (8, HK, HEAD), (8, HK, HEAD)]
    given = [torch.randn(*shape).to(dtype) for shape in shapes]
    grad_out = torch.randn(8, HQ, HEAD).to(dtype)
    grad_out[2, 1] = 0

    def lse_gradient(out: Tensor) -> Tensor:  # as of a joint softmax: nothing without do
        return (grad_out.to(out.dtype) * out.roll(1, 0)).sum(-1).mT.detach() * 0.3

    got, exact = [], []
    leaves = [x.clone().requires_grad_() for x in given]
    out, lse = torch.ops.moda_compile.varlen_attention(*leaves, offsets, 5, *window, 0.3)
    wide = [x.double().requires_grad_() for x in given]
    scores = _masked(wide[0], wide[1], offsets, window, 0.3)
    values = wide[2].repeat_interleave(HQ // HK, 1)
    true, true_lse = torch.einsum("htu,uhd->thd", scores.softmax(-1), values), scores.logsumexp(-1)
    dlse = lse_gradient(true)
    got = [out, lse, *torch.autograd.grad((out, lse), leaves, (grad_out, dlse.to(lse.dtype)))]
    exact = [true, true_lse]
    exact += torch.autograd.grad((true, true_lse), wide, (grad_out.double(), dlse))
    allowed = 20 * torch.finfo(dtype).eps
    for x, y in zip(got, exact, strict=True):
        assert x.dtype == (torch.promote_types(dtype, torch.float32) if y is true_lse else dtype)
        assert (x.double() - y).norm() <= allowed * y.norm()


def test_the_operators_pass_opcheck() -> None:
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = (torch.randn(5, h, HEAD, requires_grad=True) for h in (HQ, HK, HK))
    args = (q, k, v, offsets, 3, -1, 0, 0.3)
    torch.library.opcheck(torch.ops.moda_compile.varlen_attention.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(5, 3, HEAD)), "3 query heads over 2"),
        (dict(q=torch.zeros(4, HQ, HEAD)), r"got q \(4, 4, 8\)"),
        (dict(offsets=torch.tensor([0, 5])), "offsets are torch.int64"),
    ],
    ids=["heads", "tokens", "offsets"],
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    given = dict(q=torch.zeros(5, HQ, HEAD), k=torch.zeros(5, HK, HEAD))
    given |= dict(v=given["k"], offsets=torch.tensor([0, 5], dtype=torch.int32)) | change
    with pytest.raises(moda_compile.InputError, match=message):
        torch.ops.moda_compile.varlen_attention(*given.values(), 5, -1, 0, 0.3)
