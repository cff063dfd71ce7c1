"""FlexAttention's call as the sequence part: its output, and its lse in natural logarithm."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from moda_compile import fx
from moda_compile.patterns import Attention, Refused, flex
from tests.graph.graphs import trace

B, T, HQ, HK, D = 2, 5, 4, 2, 8
CALL = torch.ops.higher_order.flex_attention
LSE = "OUTPUT_LOGSUMEXP"
# float64; log(2) and exp2 cost a few roundings of numbers below 10.
TIGHT = dict(rtol=0.0, atol=1e-13)

Core = Callable[[Tensor, Tensor, Tensor], Any]


def qkv(kv_heads: int = HK) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64).transpose(1, 2)

    return draw(HQ), draw(kv_heads), draw(kv_heads)


def dense(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float = D**-0.5
) -> tuple[Tensor, Tensor]:
    """Output and lse of softmax(scale q k^T + bias) v."""
    k, v = (x.repeat_interleave(HQ // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale + bias
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def calls(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target is CALL]


def found(gm: GraphModule) -> Attention:
    matches = [m for n in list(gm.graph.nodes) if (m := flex.match(n)) is not None]
    assert len(matches) == 1
    return matches[0]


def sequence_part(core: Core, *inputs: Tensor) -> tuple[Attention, tuple[Tensor, Tensor]]:
    """The match in the graph of a core, and what its sequence part computes."""
    matched: list[Attention] = []

    def keep(gm: GraphModule, _inputs: Any) -> Any:
        attention = found(gm)
        matched.append(attention)
        (end,) = gm.graph.find_nodes(op="output")
        assert attention.sequence is not None
        end.args = (attention.sequence,)
        attention.sequence[0].graph.lint()
        gm.recompile()
        return lambda *args: (gm.forward(*args),)

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(core, backend=keep, dynamic=False)(*inputs)
    return matched[0], result


ROWS, COLUMNS = torch.arange(T)[:, None], torch.arange(T)
NOTHING = torch.zeros(T, T)
CAUSAL = torch.where(COLUMNS <= ROWS, 0.0, -math.inf)
BIAS = torch.linspace(-1, 1, HQ, dtype=torch.float64)
DOCUMENT = torch.tensor([0, 0, 1, 1, 1])


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < 2)


def document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (DOCUMENT[i] == DOCUMENT[j])


def slope(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score + BIAS[h] * (j - i)


SLOPES = BIAS[:, None, None] * (COLUMNS - ROWS)
WINDOW = torch.where((COLUMNS <= ROWS) & (ROWS - COLUMNS < 2), 0.0, -math.inf)
DOCUMENTS = torch.where(
    (COLUMNS <= ROWS) & (DOCUMENT[:, None] == DOCUMENT), 0.0, -math.inf
)  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "bias", "mod", "kv_heads", "built"),
    [
        (None, NOTHING, None, HQ, "outside"),
        (None, NOTHING, slope, HK, "outside"),
        (causal, CAUSAL, None, 1, "outside"),
        (causal, CAUSAL, slope, HK, "inside"),
        (window, WINDOW, None, HK, "inside"),
        (window, WINDOW, slope, HQ, "outside"),
        (document, DOCUMENTS, None, HQ, "outside"),
        (document, DOCUMENTS, slope, 1, "outside"),
    ],
)
def test_the_call_is_its_own_sequence_part(
    mask: Any, bias: Tensor, mod: Any, kv_heads: int, built: str
) -> None:
    outside = None if mask is None else create_block_mask(mask, None, None, T, T, device="cpu")

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = outside
        if mask is not None and built == "inside":
            blocks = create_block_mask(mask, None, None, T, T, device="cpu")
        return flex_attention(q, k, v, score_mod=mod, block_mask=blocks, enable_gqa=True)

    inputs = qkv(kv_heads)
    attention, got = sequence_part(core, *inputs)
    expected = dense(*inputs, bias + (SLOPES if mod else 0.0))
    torch.testing.assert_close(got, expected, **TIGHT)
    assert (attention.is_causal, attention.mask, attention.restore) == (False, None, ())
    assert attention.pattern == "flex"
    assert attention.scale == 1.0 / math.sqrt(D)
    assert fx.value(attention.key).shape == (B, kv_heads, T, D)


def test_scale_is_the_calls() -> None:
    inputs = qkv()
    attention, got = sequence_part(
        lambda q, k, v: flex_attention(q, k, v, scale=0.3, enable_gqa=True), *inputs
    )
    assert attention.scale == 0.3
    torch.testing.assert_close(got, dense(*inputs, NOTHING, 0.3), **TIGHT)


@pytest.mark.parametrize("width", [5, 16])
def test_values_of_another_head_dim(width: int) -> None:
    q, k, v = qkv()
    inputs = q, k, torch.cat([v, v.flip(-1)], -1)[..., :width]
    attention, got = sequence_part(lambda *x: flex_attention(*x, enable_gqa=True), *inputs)
    torch.testing.assert_close(got, dense(*inputs, NOTHING), **TIGHT)
    assert attention.value.meta["example_value"].shape == (B, HK, T, width)


def test_a_row_that_sees_nothing_weighs_nothing() -> None:
    blocks = create_block_mask(lambda b, h, i, j: i > 1, None, None, T, T, device="cpu")
    _, (out, lse) = sequence_part(
        lambda q, k, v: flex_attention(q, k, v, block_mask=blocks, enable_gqa=True), *qkv()
    )
    assert (lse[:, :, :2] == -math.inf).all() and (out[:, :, :2] == 0).all()
    assert lse[:, :, 2:].isfinite().all()


# --- the lse is asked for ------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options = {"ROWS_GUARANTEED_SAFE": True}
    return flex_attention(q, k, v, enable_gqa=True, kernel_options=options)


def test_a_call_that_stores_no_lse_is_repeated_with_it() -> None:
    """The original stays as it is, in case the match is not taken, and then the copy goes."""
    gm = trace(plain, *qkv())
    (call,) = calls(gm)
    before = call.format_node()
    attention = found(gm)
    assert attention.sequence is not None
    copy = attention.sequence[0].args[0]
    assert isinstance(copy, Node) and calls(gm) == [call, copy] and call.format_node() == before
    options, changed = call.args[6], copy.args[6]
    assert isinstance(options, dict) and not options[LSE]
    assert changed == {**options, LSE: True} and changed["ROWS_GUARANTEED_SAFE"] is True
    assert (*copy.args[:6], *copy.args[7:]) == (*call.args[:6], *call.args[7:])
    assert [x.shape for x in fx.value(copy)] == [x.shape for x in fx.value(call)]
    fx.drop_unused(gm)
    assert calls(gm) == [call]


def test_a_call_that_stores_it_is_used_itself() -> None:
    """As in training on a GPU."""
    gm = trace(plain, *qkv())
    (call,) = calls(gm)
    call.update_arg(6, {**call.args[6], LSE: True})  # type: ignore[dict-item]
    attention = found(gm)
    assert attention.sequence is not None
    out, lse = attention.sequence
    assert calls(gm) == [call] and out.args == (call, 0) and out is not attention.node
    assert lse.target is operator.mul and lse.args[1] == math.log(2)


# --- refused -------------------------------------------------------------------------------------


def refused(core: Core, *inputs: Tensor) -> Refused:
    gm = trace(core, *(inputs or qkv()))
    with pytest.raises(Refused) as caught:
        found(gm)
    assert caught.value.fix.endswith(".")
    return caught.value


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = flex_attention(q, k, v, enable_gqa=True, return_lse=True)
    return out, lse


def with_aux(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, aux = flex_attention(q, k, v, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out * aux.lse[..., None]


@pytest.mark.parametrize("core", [with_lse, with_aux])
def test_an_lse_that_is_used_is_refused(core: Core) -> None:
    assert "lse or max_scores is used" in refused(core).reason


def test_an_lse_that_is_only_computed_is_not_missed() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, enable_gqa=True, return_lse=True)
        lse.to(torch.float32)
        return out

    inputs = qkv()
    _, got = sequence_part(core, *inputs)
    torch.testing.assert_close(got, dense(*inputs, NOTHING), **TIGHT)


def test_a_backend_with_another_lse_is_refused() -> None:
    gm = trace(plain, *qkv())
    (call,) = calls(gm)
    call.update_arg(6, {**call.args[6], "BACKEND": "FLASH"})  # type: ignore[dict-item]
    with pytest.raises(Refused, match="BACKEND='FLASH'"):
        found(gm)


def test_nothing_else_is_matched() -> None:
    gm = trace(plain, *qkv())
    ours = [n for n in list(gm.graph.nodes) if flex.match(n) is not None]
    assert [(n.target, n.args[1]) for n in ours] == [(operator.getitem, 0)]
