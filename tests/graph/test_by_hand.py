"""Attention written by hand: each spelling's match means what the graph computes.

What a match says is evaluated from its own nodes in float64 and compared with the node's value
(:func:`tests.graph.graphs.deviation`). Most tolerances are ``EXACT``: both sides compute in
float64, in another order. Where the model's own softmax is in float32 it is ``SINGLE``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moda_compile import fx
from tests.graph.graphs import (
    WIDTH,
    Attend,
    B,
    D,
    H,
    T,
    deviation,
    graph_of,
    hint,
    one,
    trace,
)

EXACT = 1e-12
SINGLE = 1e-5
Core = Callable[..., Tensor]


def hidden(x: Tensor) -> Tensor:
    """True above the diagonal."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)


def flat(*given: Tensor) -> list[Tensor]:
    return [x.reshape(-1, *x.shape[-2:]) for x in given]


def alibi(x: Tensor) -> Tensor:
    steps = torch.arange(T, dtype=x.dtype)
    return torch.arange(H, dtype=x.dtype).view(1, H, 1, 1) * (steps - steps[:, None])


# --- products ------------------------------------------------------------------------------------


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = flat(q, k, v)
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(B, H, T, D)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = flat(q, k, v)
    bias = alibi(q).expand(B, H, T, T).reshape(B * H, T, T)
    return bias.baddbmm(batch1=q, batch2=k.mT, beta=0.5, alpha=0.3).softmax(-1) @ v


def empty_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = flat(q, k, v)
    empty = q.new_empty(B * H, T, T)
    return torch.baddbmm(empty, q, k.mT, beta=0, alpha=0.3).softmax(-1) @ v


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, B * H, d], as sequence-first models have it."""
    q, k, v = (x.permute(2, 0, 1, 3).reshape(T, B * H, D).transpose(0, 1) for x in (q, k, v))
    scores = torch.bmm(q * D**-0.5, k.transpose(1, 2)).view(B, H, T, T)
    scores = scores.masked_fill(hidden(q), -math.inf).view(B * H, T, T)
    return torch.bmm(scores.softmax(-1), v).transpose(0, 1).reshape(T, B, H * D)


def heads_outermost(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).contiguous().view(-1, T, D) for x in (q, k, v))
    scores = (q @ k.mT).masked_fill(hidden(q).repeat(H * B, 1, 1), -math.inf)
    return (scores.softmax(2) @ v).view(H, B, T, D).permute(1, 2, 0, 3).reshape(B, T, -1)


def letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def odd_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores with the keys first: the softmax is over dimension 0."""
    weights = torch.einsum("bhid , bhjd -> jbih", q, k).softmax(0)
    return torch.einsum("jbih,bhjd->dbih", weights, v)


def dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("...qd,...kd->...qk", [q, k]).softmax(-1)
    return torch.einsum("...qk,...kd", weights, v)


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(v^T p^T)^T with the keys' product the other way round, too."""
    scores = k @ q.mT
    return (v.mT @ scores.softmax(-2)).mT


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[..., None, :] * k[:, :, None]).sum(-1)
    return (scores.softmax(-1).unsqueeze(-1) * v[:, :, None]).sum(dim=-2)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0]


PRODUCTS: dict[str, Core] = {
    "@": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "matmul": lambda q, k, v: torch.matmul(
        F.softmax(torch.matmul(q, k.transpose(-2, -1)), dim=-1), v
    ),
    "method": lambda q, k, v: q.matmul(k.permute(0, 1, 3, 2)).softmax(dim=3).matmul(v),
    "bmm": bmm, "baddbmm": baddbmm, "empty baddbmm": empty_baddbmm, "tokens first": tokens_first,
    "heads outermost": heads_outermost, "einsum": letters, "odd einsum": odd_letters,
    "dotted einsum": dots, "transposed": transposed, "summed": summed, "one head": one_head,
    "no batch": lambda q, k, v: (q[0] @ k[0].mT).softmax(-1) @ v[0],
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    gm = graph_of(PRODUCTS[name], dtype=torch.float64)
    attention = one(gm)
    assert deviation(gm, attention) < EXACT
    gm.graph.lint()
    operands = (attention.query, attention.key, attention.value)
    shape = {"one head": (B, 1, T, D), "no batch": (H, 1, T, D)}.get(name, (B, H, T, D))
    assert {tuple(fx.value(x).shape) for x in operands} == {shape}
    if shape == (B, H, T, D):  # the layer's own tensors, and no views of copies of them
        assert [x.name for x in operands] == ["q", "k", "v"]


# --- scales --------------------------------------------------------------------------------------

SCALES: dict[str, tuple[Core, float]] = {
    "query": (lambda q, k, v: (q * 0.3) @ k.mT, 0.3),
    "key": (lambda q, k, v: q @ (0.3 * k).mT, 0.3),
    "transposed key": (lambda q, k, v: q @ (k.mT * 0.3), 0.3),
    "both": (lambda q, k, v: (q / 2.0) @ (k.mT / 4.0), 0.125),
    "scores": (lambda q, k, v: torch.mul(q @ k.mT, 0.3), 0.3),
    "divided": (lambda q, k, v: torch.div(q @ k.mT, math.sqrt(D)), D**-0.5),
    "in place": (lambda q, k, v: (q @ k.mT).div_(4.0), 0.25),
    "a tensor": (lambda q, k, v: q @ k.mT / torch.tensor(4.0), 0.25),
    "the root of a tensor": (lambda q, k, v: q @ k.mT * torch.full((), 16.0).rsqrt(), 0.25),
    "all of them": (lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT * 2.0) / 4.0, 0.125),
    "cast and scaled": (lambda q, k, v: (q.float() * 0.5).double() @ k.mT, 0.5),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales(name: str) -> None:
    scores, scale = SCALES[name]
    gm = graph_of(lambda q, k, v: scores(q, k, v).softmax(-1) @ v, dtype=torch.float64)
    attention = one(gm)
    assert attention.scale == pytest.approx(scale, rel=1e-7)  # a float32 tensor's own precision
    assert attention.key.name == "k"  # before any number it was multiplied with
    assert deviation(gm, attention) < (SINGLE if "cast" in name else EXACT)


def test_a_query_scaled_in_place_is_what_it_became() -> None:
    """The unscaled query is gone when the rewritten attention reads it."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.clone()
        q *= 0.5
        return (q @ k.mT * 0.5).softmax(-1) @ v

    gm = graph_of(core, dtype=torch.float64)
    attention = one(gm)
    assert attention.scale == 0.5
    assert deviation(gm, attention) < EXACT


# --- masks ---------------------------------------------------------------------------------------


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(hidden(q), torch.finfo(scores.dtype).min)
    scores += alibi(q)
    return scores.softmax(-1) @ v


def assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[hidden(q).expand(B, H, T, T)] = -math.inf
    return scores.softmax(-1) @ v


def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal by torch.where, padding added on top, as in older GPT-2s."""
    scores = q @ k.mT / math.sqrt(D)
    scores = torch.where(~hidden(q), scores, torch.full([], -1e4, dtype=scores.dtype))
    padding = (torch.arange(T) != T - 1)[None, None, None].to(scores.dtype)
    return (scores + (1.0 - padding) * -10000.0).softmax(-1) @ v


def scaled_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(scores + mask) * s is s * scores + s * mask."""
    return ((q @ k.mT + alibi(q)) * 0.3).softmax(-1) @ v


def of_flat_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = flat(q, k, v)
    per_head = alibi(q).expand(B, H, T, T).reshape(B * H, T, T)
    return (per_head + q @ k.mT).softmax(-1) @ v


def zeroed_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = hidden(q)
    weights = (q @ k.mT).masked_fill(mask, -math.inf).softmax(-1)
    return weights.masked_fill(mask, 0.0).nan_to_num(0.0) @ v


CAUSAL, GENERAL, NONE = (True, False), (False, True), (False, False)  # is_causal, has a mask
MASKS: dict[str, tuple[Core, tuple[bool, bool]]] = {
    "masked_fill": (lambda q, z: z.masked_fill(hidden(q), -math.inf), CAUSAL),
    "masked_fill -1e4": (lambda q, z: z.masked_fill(hidden(q), -1e4), CAUSAL),
    "where": (lambda q, z: torch.where(hidden(q), -1e9, z), CAUSAL),
    "where, a method": (lambda q, z: z.where(~hidden(q), -1e9), CAUSAL),
    "added": (lambda q, z: z + torch.full_like(z, -math.inf).triu(1), CAUSAL),
    "added in front": (lambda q, z: q.new_full((T, T), -1e9).triu(1) + z, CAUSAL),
    "subtracted": (lambda q, z: z - 1e4 * hidden(q).to(q.dtype), CAUSAL),
    "added twice": (lambda q, z: torch.add(z, q.new_full((T, T), -5e3).triu(1), alpha=2), CAUSAL),
    "bounded": (
        lambda q, z: torch.max(
            z + q.new_full((T, T), -1e9).triu(1), torch.tensor(-3e38, dtype=z.dtype)
        ),
        CAUSAL,
    ),
    "nothing": (lambda q, z: z + q.new_zeros(B, 1, 1, T), NONE),
    "alibi": (lambda q, z: z + alibi(q), GENERAL),
    "two biases": (lambda q, z: alibi(q) + z - alibi(q).abs(), GENERAL),
    "causal and alibi": (lambda q, z: (z + alibi(q)).masked_fill(hidden(q), -1e9), GENERAL),
    "alibi and causal": (lambda q, z: z.masked_fill(hidden(q), -1e9) + alibi(q), GENERAL),
    "two fills": (
        lambda q, z: z.masked_fill(hidden(q), -1e9).masked_fill(hidden(q).roll(2, 1), -1e9)
        .masked_fill(torch.eye(T, dtype=torch.bool)[0] & False, -1e9),
        GENERAL,
    ),
    "of the hidden state": (lambda q, z: z + q.mean(-1, keepdim=True).mT, GENERAL),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    mask, expected = MASKS[name]
    core: Core = lambda q, k, v: mask(q, q @ k.mT * 0.3).softmax(-1) @ v  # noqa: E731
    gm = graph_of(core, dtype=torch.float64)
    attention = one(gm)
    assert (attention.is_causal, attention.mask is not None) == expected
    if name != "two fills":  # which hides a whole row: there -inf and -1e9 differ, and NaN says so
        assert deviation(gm, attention) < EXACT


@pytest.mark.parametrize(
    ("core", "expected"),
    [(in_place, GENERAL), (assigned, CAUSAL), (nested, GENERAL), (scaled_mask, GENERAL),
     (of_flat_scores, GENERAL), (zeroed_again, CAUSAL)],
)  # fmt: skip
def test_masks_in_whole_attentions(core: Core, expected: tuple[bool, bool]) -> None:
    gm = graph_of(core, dtype=torch.float64)
    attention = one(gm)
    assert (attention.is_causal, attention.mask is not None) == expected
    assert deviation(gm, attention) < EXACT


class Buffered(nn.Module):
    """A registered triangle, cut to the length that is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("bias", torch.ones(16, 16).tril().view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(B, T, H, D).transpose(1, 2) for y in self.qkv(x).split(WIDTH, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, -math.inf)
        weights = F.dropout(F.softmax(scores, dim=-1), 0.1, training=False)
        return (weights @ v).transpose(1, 2).contiguous().view(B, T, WIDTH)


def test_a_buffer_is_a_mask_like_any_other() -> None:
    """Its values may change without the graph's being traced anew, so nothing is shown of it."""
    gm = trace(Buffered().double(), torch.randn(B, T, WIDTH, dtype=torch.float64))
    attention = one(gm)
    assert not attention.is_causal
    assert fx.value(attention.mask).dtype == torch.bool


# --- precision -----------------------------------------------------------------------------------


def test_a_softmax_in_single_precision_with_casts() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).float().masked_fill(hidden(q), torch.finfo(torch.float32).min)
        return F.softmax(scores, dim=-1, dtype=torch.float32).type_as(v) @ v

    gm = graph_of(core, dtype=torch.float64)
    attention = one(gm)
    assert attention.is_causal
    assert deviation(gm, attention) < SINGLE


def test_dropout_that_does_nothing() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.dropout((q @ k.mT).softmax(-1), p=0.0)
        return F.dropout(weights, p=0.5, training=False) @ v

    gm = graph_of(core, dtype=torch.float64)
    assert deviation(gm, one(gm)) < EXACT


def test_the_maximum_taken_off_first() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v

    gm = graph_of(core, dtype=torch.float64)
    assert deviation(gm, one(gm)) < EXACT


def test_relative_positions_are_a_bias() -> None:
    """A sum of two products: only one of them is of queries and keys."""

    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.table = nn.Linear(WIDTH, 3 * WIDTH), nn.Embedding(2 * T, D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
            )
            steps = torch.arange(T)
            far = self.table((steps[:, None] - steps) + T)
            bias = torch.einsum("bhtd,tud->bhtu", q, far)
            return (torch.einsum("bhtd,bhud->bhtu", q, k) + bias).softmax(-1) @ v

    gm = trace(Relative().double(), torch.randn(B, T, WIDTH, dtype=torch.float64))
    attention = one(gm)
    assert attention.mask is not None
    assert deviation(gm, attention) < EXACT


# --- symbolic sizes ------------------------------------------------------------------------------


def dynamic(core: Core, length: int = T) -> list[Any]:
    """The match, its deviation and its sizes, found inside of the compile: guards may be added."""
    torch._dynamo.reset()
    found: list[Any] = []

    def keep(gm: Any, _inputs: Any) -> Any:
        attention = one(gm)
        key = fx.value(attention.key)
        found.append((attention, deviation(gm, attention), [hint(s) for s in key.shape]))
        return gm.forward

    x = torch.randn(3, length, WIDTH, dtype=torch.float64)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    torch.compile(Attend(core).double(), backend=keep, fullgraph=True)(x)
    ((attention, off, sizes),) = found  # no size was made a constant: that would have raised
    return [attention, off, sizes]


@pytest.mark.parametrize("length", [T, H])  # also where the number of heads happens to be equal
def test_symbolic_sizes(length: int) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = q.shape
        q, k, v = (x.permute(2, 0, 1, 3).reshape(t, b * h, d).transpose(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.mT).view(b, h, t, t).masked_fill(hidden(q), -math.inf)
        return torch.bmm(scores.view(b * h, t, t).softmax(-1), v).transpose(0, 1).reshape(t, b, -1)

    attention, off, sizes = dynamic(core, length)
    assert attention.is_causal
    assert attention.max_length == 2048
    assert sizes == [3, H, length, D]
    assert off < EXACT


# --- spellings combined --------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "bhtd": (lambda x: x, "bhtd"),
    "bthd": (lambda x: x.transpose(1, 2).contiguous(), "bthd"),
    "tbhd": (lambda x: x.permute(2, 0, 1, 3), "tbhd"),
    "hbtd": (lambda x: x.transpose(0, 1), "hbtd"),
    "bhdt": (lambda x: x.mT.contiguous(), "bhdt"),
}
SPELLINGS = st.fixed_dictionaries(
    {
        "layouts": st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
        "scores": st.permutations("bhtu"),
        "output": st.permutations("bhtd"),
        "scale": st.sampled_from(["none", "query", "key", "both", "before", "after", "tensor"]),
        "mask": st.sampled_from(["none", "fill", "where", "added", "alibi", "both"]),
        "single": st.booleans(),
        "dropout": st.booleans(),
        "groups": st.sampled_from([1, 2, H]),
    }
)


def spelled(how: dict[str, Any]) -> Core:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = how["groups"]
        k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
        (q, q_), (k, k_), (v, v_) = (
            (LAYOUTS[name][0](x), LAYOUTS[name][1])
            for x, name in zip((q, k, v), how["layouts"], strict=True)
        )
        if how["scale"] in ("query", "both"):
            q = q * 0.5
        if how["scale"] in ("key", "both"):
            k = k / 2
        order = "".join(how["scores"])
        scores = torch.einsum(f"{q_},{k_.replace('t', 'u')}->{order}", q, k)
        if how["scale"] == "before":
            scores = scores * 0.3
        if how["scale"] == "tensor":
            scores = scores / torch.tensor(4.0)

        def placed(x: Tensor) -> Tensor:  # [1 or B, 1 or H, T, T] in the order of the scores
            return x.permute(*("bhtu".index(axis) for axis in order))

        triangle = placed(hidden(torch.empty(T, T))[None, None])
        if how["mask"] in ("alibi", "both"):
            scores = scores + placed(alibi(q))
        if how["mask"] in ("fill", "both"):
            scores = scores.masked_fill(triangle, -math.inf)
        if how["mask"] == "where":
            scores = torch.where(triangle, -1e9, scores)
        if how["mask"] == "added":
            scores = scores + triangle.to(scores.dtype) * -1e9
        if how["scale"] == "after":
            scores = scores * 0.3
        dtype = torch.float32 if how["single"] else None
        weights = F.softmax(scores, dim=order.index("u"), dtype=dtype).to(v.dtype)
        if how["dropout"]:
            weights = F.dropout(weights, 0.3, training=False)
        out = "".join(how["output"])
        return torch.einsum(f"{order},{v_.replace('t', 'u')}->{out}", weights, v)

    return core


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(how=SPELLINGS)
def test_any_spelling_means_what_it_computes(how: dict[str, Any]) -> None:
    gm = graph_of(spelled(how), H // how["groups"], torch.float64)
    attention = one(gm)
    assert fx.value(attention.key).shape == (B, H // how["groups"], T, D)
    assert attention.is_causal == (how["mask"] in ("fill", "where", "added"))
    assert (attention.mask is not None) == (how["mask"] in ("alibi", "both"))
    assert deviation(gm, attention) < (SINGLE if how["single"] else EXACT)
    gm.graph.lint()
