"""Rows of the user's own: registering, order, and errors that name the row that made them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import moda_compile
from moda_compile import InputError, MoDAConfig, fx, pipeline, register_pattern
from moda_compile.patterns import (
    PATTERNS,
    Attention,
    LeftAlone,
    Pattern,
    Refused,
    Registration,
    Step,
    registry,
)
from moda_compile.testing import reference
from tests.graph.graphs import WIDTH, Attend, B, D, H, T, capture


@torch.library.custom_op("registry_test::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A user's own, causal, on [B, T, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).clone()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


OP = torch.ops.registry_test.attention


def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return OP(q, k, v).transpose(1, 2)


def match(node: Node) -> Attention | None:
    if not fx.calls_op(node, OP):
        return None
    gm = node.graph.owning_module
    assert gm is not None
    with gm.graph.inserting_before(node):
        query, key, value = (fx.insert(gm, "transpose", (x, 1, 2), like=node) for x in node.args)
    return Attention(
        node=node,
        pattern="own",
        query=query,
        key=key,
        value=value,
        is_causal=True,
        scale=None,
        restore=(Step("transpose", (1, 2)),),
    )


def row(match: Callable[[Node], Any] = match, name: str = "own") -> Pattern:
    return Pattern(name=name, accepts="This test's.", refuses="Nothing.", match=match)


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """No test leaves a row behind."""
    assert registry.rows() == PATTERNS
    yield
    for pattern in registry.rows():
        if pattern not in PATTERNS:
            Registration(pattern).remove()


class Stack(nn.Module):
    def __init__(self, core: Callable[..., Tensor] = core) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attend(core) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).transpose(1, 2).flatten(2)
        return x


X = torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def graph() -> GraphModule:
    return capture(Attend(core).double(), X)[0]


def call_in(gm: GraphModule) -> Node:
    return next(n for n in gm.graph.nodes if fx.calls_op(n, OP))


# --- registering ----------------------------------------------------------------------------------


def test_a_registered_row_converts() -> None:
    model = Stack()
    with pytest.raises(moda_compile.RewriteError, match=r"moda_compile\.register_pattern"):
        moda_compile.convert(model, example_inputs=(X,), backend="eager")

    def adapter(attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, is_causal=True).transpose(1, 2)

    expected = reference(model, X, functions={OP: adapter})
    with register_pattern(row()):
        report = moda_compile.explain(model, X)
        assert [(a.pattern, a.heads, a.head_dim, a.causal) for a in report.attentions] == [
            ("own", H, D, True)
        ] * 3
        converted = moda_compile.convert(model, example_inputs=(X,), backend="eager")
        # float64, three layers of 32 channels: a few hundred roundings of numbers of order 1.
        torch.testing.assert_close(converted(X), expected, rtol=0, atol=1e-11)
    moda_compile.revert(model)
    assert (model(X) - expected).abs().max() > 1e-3


def test_a_model_whose_row_is_gone_raises() -> None:
    """It does not become the plain model where it is traced anew."""
    model = Stack()
    with register_pattern(row()):
        moda_compile.convert(model, example_inputs=(X,), backend="eager")
        model(X)
    with pytest.raises(moda_compile.RewriteError, match="attention"):
        model(X[:, :-1])


def test_order() -> None:
    """Newest first, before the built-in rows."""
    first = register_pattern(row(name="first"))
    second = register_pattern(row(name="second"))
    assert [p.name for p in registry.rows()] == ["second", "first", *(p.name for p in PATTERNS)]
    first.remove()
    first.remove()
    assert [p.name for p in registry.rows()][:2] == ["second", PATTERNS[0].name]
    assert "registered" in repr(second) and "removed" in repr(first)
    with second as same:
        assert same is second
    assert registry.rows() == PATTERNS


def test_a_row_of_ones_own_goes_first() -> None:
    """Also for what the library knows by itself."""

    def mine(node: Node) -> None:
        if node.target is F.scaled_dot_product_attention:
            raise LeftAlone("it is mine.")

    model = Stack(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    assert len(moda_compile.explain(model, X).attentions) == 3
    with register_pattern(row(mine)):
        assert len(moda_compile.explain(model, X).attentions) == 0


def test_a_refusal_of_ones_own_is_reported() -> None:
    def refusing(node: Node) -> None:
        if fx.calls_op(node, OP):
            raise Refused("it is too old.", "buy a new one.")

    with register_pattern(row(refusing)):
        with pytest.raises(moda_compile.RewriteError, match="too old.*To fix: buy a new one"):
            moda_compile.convert(Stack(), example_inputs=(X,), backend="eager")
        report = moda_compile.explain(Stack(), X)
    assert [(a.pattern, a.refusal) for a in report.refusals] == [
        ("own", "it is too old. To fix: buy a new one.")
    ] * 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (match, "got function, expected a moda_compile.patterns.Pattern"),
        (row(name=""), "name is '', expected words"),
        (row(name=3), "pattern 3: name is 3, expected words"),  # type: ignore[arg-type]
        (dataclasses.replace(row(), accepts=None), "pattern 'own': accepts is None"),
        (dataclasses.replace(row(), refuses=" "), "pattern 'own': refuses is ' '"),
        (dataclasses.replace(row(), match="no"), "pattern 'own': match is 'no', expected a func"),
        (row(name="sdpa"), "there is a pattern 'sdpa' already"),
    ],
)
def test_what_is_no_row_is_refused(pattern: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        register_pattern(pattern)
    assert registry.rows() == PATTERNS


def test_a_name_is_taken_once() -> None:
    with register_pattern(row()), pytest.raises(InputError, match="'own' already"):
        register_pattern(row())
    with register_pattern(row()):  # and free again
        pass


# --- mistakes -------------------------------------------------------------------------------------


def raising(node: Node) -> None:
    raise KeyError("head_dim")


def test_any_exception_names_the_row() -> None:
    with register_pattern(row(raising)), pytest.raises(InputError) as caught:
        moda_compile.convert(Stack(), example_inputs=(X,), backend="eager")
    assert str(caught.value).startswith("pattern 'own', given the node ")
    assert "it raised KeyError: 'head_dim'" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_mistake_of_our_own_says_so() -> None:
    gm = graph()
    with pytest.raises(InputError, match="the library's own: please report it"):
        registry.apply(dataclasses.replace(PATTERNS[0], match=raising), call_in(gm))


def placeholder(gm: GraphModule, dim: int) -> Node:
    return next(n for n in gm.graph.nodes if n.op == "placeholder" and fx.value(n).dim() == dim)


def made(gm: GraphModule, a: Attention, target: Any, *args: Any) -> Node:
    with gm.graph.inserting_before(a.node):
        return fx.insert(gm, target, args, like=a.node)


def ones(gm: GraphModule, a: Attention, *shape: int, dtype: Any = torch.bool) -> Node:
    row_ = made(gm, a, "sum", a.query)  # something with a fake mode
    flat = made(gm, a, "to", row_, dtype)
    return made(gm, a, "expand", flat, shape)


BROKEN: dict[str, tuple[Callable[[GraphModule, Attention], dict[str, Any]], str]] = {
    "node": (lambda gm, a: {"node": a.query}, "expected the node that was given"),
    "name": (lambda gm, a: {"pattern": "other"}, "pattern is 'other', expected the row's name"),
    "no node": (lambda gm, a: {"key": 3}, "key is int, expected a node"),
    "other graph": (lambda gm, a: {"value": call_in(graph())}, "no node of this graph"),
    "no tensor": (lambda gm, a: {"query": made(gm, a, "size", a.query)}, "yields no tensor"),
    "rank": (
        lambda gm, a: {"query": placeholder(gm, 3)},
        r"query has shape \(2, 5, 32\), expected \[B, H, T, d\]",
    ),
    "behind": (lambda gm, a: {"key": next(iter(a.node.users))}, "which is not in front of"),
    "shapes": (
        lambda gm, a: {"value": made(gm, a, "narrow", a.value, 2, 0, 4)},
        r"keys \(2, 4, 5, 8\) and values \(2, 4, 4, 8\), expected \[B, Hk, T, d\] and \[B",
    ),
    "another head_dim": (
        lambda gm, a: {"value": made(gm, a, "narrow", a.value, 3, 0, 4)},
        r"restore leads from \[B, Hq, T, dv\] to \(2, 5, 4, 4\), but node yields \(2, 5, 4, 8",
    ),
    "layout": (
        lambda gm, a: {n: a.node.args[i] for i, n in ((1, "key"), (2, "value"))},
        r"queries \(2, 4, 5, 8\) over keys \(2, 5, 4, 8\).*Hq a multiple of Hk",
    ),
    "is_causal": (lambda gm, a: {"is_causal": 1}, "is_causal is 1, expected True or False"),
    "scale": (lambda gm, a: {"scale": a.query}, "expected a number or None"),
    "infinite scale": (lambda gm, a: {"scale": float("inf")}, "scale is inf"),
    "max_length": (lambda gm, a: {"max_length": 2.5}, "max_length is 2.5"),
    "both": (lambda gm, a: {"mask": ones(gm, a, T, T)}, "both is_causal and a mask"),
    "mask's dtype": (
        lambda gm, a: {"mask": ones(gm, a, T, T, dtype=torch.int64), "is_causal": False},
        r"mask is torch.int64, expected bool \(True attends\)",
    ),
    "mask's shape": (
        lambda gm, a: {"mask": ones(gm, a, B, T), "is_causal": False},
        r"mask has shape \(2, 5\), expected one that broadcasts to \(2, 4, 5, 5\)",
    ),
    "restore": (lambda gm, a: {"restore": ()}, r"to \(2, 4, 5, 8\), but node yields \(2, 5, 4, 8"),
    "no step": (lambda gm, a: {"restore": ("transpose",)}, "expected a tuple of Steps"),
    "impossible step": (
        lambda gm, a: {"restore": (Step("view", (7,)),)},
        r"restore can't be applied to \[B, Hq, T, dv\]: RuntimeError",
    ),
    "sequence": (
        lambda gm, a: {"sequence": a.query, "is_causal": False},
        r"expected the nodes \(output, lse\)",
    ),
    "lse": (
        lambda gm, a: {"sequence": (a.query, a.query), "is_causal": False},
        r"sequence's lse has shape \(2, 4, 5, 8\), expected \(2, 4, 5\)",
    ),
    "sequence and mask": (
        lambda gm, a: {"sequence": (a.query, made(gm, a, "sum", a.query, -1))},
        "a mask or is_causal beside a sequence",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_wrong_match_names_the_row(
    change: Callable[[GraphModule, Attention], dict[str, Any]], message: str
) -> None:
    def wrong(node: Node) -> Attention | None:
        found = match(node)
        gm = node.graph.owning_module
        assert gm is not None
        return None if found is None else dataclasses.replace(found, **change(gm, found))

    gm = graph()
    with register_pattern(row(wrong)), pytest.raises(InputError, match=message) as caught:
        pipeline.analyse(gm, MoDAConfig(), strict=True)
    assert "pattern 'own', given the node %attention" in str(caught.value)
    assert f"{__file__}:" in str(caught.value)


def test_what_is_no_attention_is_told() -> None:
    with (
        register_pattern(row(lambda node: True)),
        pytest.raises(InputError, match="it returned bool, expected an Attention or None"),
    ):
        pipeline.analyse(graph(), MoDAConfig(), strict=True)


GOOD: dict[str, Callable[[GraphModule, Attention], dict[str, Any]]] = {
    "as it is": lambda gm, a: {},
    "bool mask": lambda gm, a: {"mask": ones(gm, a, T, T), "is_causal": False},
    "bias": lambda gm, a: {
        "mask": ones(gm, a, 1, H, 1, T, dtype=torch.float64), "is_causal": False
    },
    "scale": lambda gm, a: {"scale": 1},
    "sequence": lambda gm, a: {
        "sequence": (a.query, made(gm, a, "sum", a.query, -1)), "is_causal": False
    },
}  # fmt: skip


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD.keys())
def test_right_matches_pass(change: Callable[[GraphModule, Attention], dict[str, Any]]) -> None:
    gm = graph()
    node = call_in(gm)
    found = match(node)
    assert found is not None
    right = dataclasses.replace(found, **change(gm, found))
    assert registry.apply(row(lambda _: right), node) is right


def test_the_names_that_rows_are_told_of_exist() -> None:
    """The list in `moda_compile.patterns.row` is what a user's row may rely on."""
    text = moda_compile.patterns.row.__doc__
    assert text is not None
    names = re.findall(r"^    (\w+)\(", text.partition("a row needs:")[2], re.MULTILINE)
    assert names == ["value", "calls", "calls_op", "argument", "insert", "item"]
    for name in (*names, "is_tensor"):
        assert getattr(fx, name).__doc__
    for name in moda_compile.patterns.__all__:
        assert hasattr(moda_compile.patterns, name)
