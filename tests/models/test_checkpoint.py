"""Activation checkpointing of a converted model: gradients, memory, recomputation, guards.

The oracle is the model without any checkpoint: that one recomputes nothing, so it calls each
attention once, as `moda_compile.testing.reference` needs it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import moda_compile
from moda_compile import Backend, MoDAConfig, NotRewrittenError, RewriteError
from moda_compile.kernels import cpu
from moda_compile.testing import reference
from tests.models.checkpointed import WAYS, Decoder, decoder, plainly

aten = torch.ops.aten
IDS = torch.arange(18).view(2, 9) % 29
# float64, and gradients of order 1: 1e-10 leaves room for thousands of roundings.
TIGHT = dict(rtol=0.0, atol=1e-10)
BACKENDS = ("eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow))
LAYERS = {"eager": 3, "aot_eager": 3, "inductor": 2}  # Inductor takes seconds a layer


def convert(model: nn.Module, config: MoDAConfig | None, backend: Any, **options: Any) -> Any:
    return moda_compile.convert(model, config, (IDS,), backend, **options)


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    call(IDS).square().mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    assert max(g.abs().max() for g in expected.values()) > 1e-3  # and not all of them zero
    torch.testing.assert_close(got, expected, **TIGHT)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_oracle(backend: str, way: str) -> None:
    layers = LAYERS[backend]
    model = decoder(layers=layers)
    expected = gradients(model, lambda ids: reference(model, ids))
    checked = convert(decoder(WAYS[way], layers=layers), None, backend)
    torch.testing.assert_close(checked(IDS), reference(model, IDS), **TIGHT)
    assert_equal(gradients(checked, checked), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ffn_kv", ["shared", "projected"])
def test_equals_the_unchecked_conversion(ffn_kv: Any, way: str) -> None:
    config = MoDAConfig(ffn_kv=ffn_kv)
    plain = convert(decoder(), config, "aot_eager")
    checked = convert(decoder(WAYS[way]), config, "aot_eager")
    checked.load_state_dict(plain.state_dict())
    added = len(list(plain.parameters())) - len(list(decoder().parameters()))
    assert (added > 0) == (ffn_kv == "projected")
    assert_equal(gradients(checked, checked), gradients(plain, plain))


def test_some_blocks_only() -> None:
    """Slots pass from inside a region to outside of it, and back."""

    model, checked = decoder(), decoder()
    first = checked.blocks[0]
    checked.how = lambda block, *args: (
        block(*args) if block is first else checkpoint(block, *args, use_reentrant=False)
    )
    convert(checked, None, "aot_eager")
    assert_equal(gradients(checked, checked), gradients(model, lambda ids: reference(model, ids)))


class Pairs(Decoder):
    """Two blocks to a checkpoint."""

    def forward(self, ids: Tensor) -> Tensor:
        x, cos, sin = self.start(ids)
        for i in (0, 2):
            one, two = self.blocks[i], self.blocks[i + 1]
            both = lambda x, one=one, two=two: two(one(x, cos, sin), cos, sin)  # noqa: E731
            x = checkpoint(both, x, use_reentrant=False)
        return self.head(x)


def attention_only(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x + checkpoint(block.attention, block.norms[0](x), cos, sin, use_reentrant=False)
    return x + block.ffn(block.norms[1](x))


@pytest.mark.parametrize("ffn_kv", ["none", "projected"])
def test_any_part_of_the_stack(ffn_kv: Any) -> None:
    plain, pairs, alone = (
        decoder(layers=4),
        Pairs(layers=4).double(),
        decoder(attention_only, layers=4),
    )
    pairs.load_state_dict(plain.state_dict())
    if ffn_kv == "none":
        expected = gradients(plain, lambda ids: reference(plain, ids))
    else:
        convert(plain, MoDAConfig(ffn_kv=ffn_kv), "aot_eager")
        expected = gradients(plain, plain)
    for model in (pairs, alone):
        convert(model, MoDAConfig(ffn_kv=ffn_kv), "aot_eager")
        model.load_state_dict(plain.state_dict())
        assert_equal(gradients(model, model), expected)


def test_depth_off_changes_nothing() -> None:
    model = convert(decoder(WAYS["not reentrant"]), MoDAConfig(depth=False), "aot_eager")
    plain = decoder()
    assert_equal(gradients(model, model), gradients(plain, plain))


class Dropping(nn.Module):
    """A block and dropout behind it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.dropout = block, nn.Dropout(0.5)

    def forward(self, *args: Any) -> Tensor:
        return self.dropout(self.block(*args))


@pytest.mark.parametrize("way", ["not reentrant", "nested"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_draws_the_same_random_numbers(backend: str, way: str) -> None:
    grads = []
    for how in (plainly, WAYS[way]):
        model = decoder(how, layers=LAYERS[backend])
        model.blocks = nn.ModuleList(Dropping(block) for block in model.blocks)
        convert(model, None, backend)
        with torch._inductor.config.patch(fallback_random=True):  # eager's random numbers
            torch.manual_seed(1)
            grads.append(gradients(model, model))
    assert_equal(*grads)


def test_autocast_inside_and_outside() -> None:
    """A region's autocast is its own; slots cross in the dtype that attention computes in."""

    def low(block: nn.Module, *args: Any) -> Tensor:
        def inner(*args: Any) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return block(*args).float()

        return checkpoint(inner, *args, use_reentrant=False)

    plain, checked = decoder(), decoder(low)
    outer = convert(plain.float(), None, "aot_eager")
    model = convert(checked.float(), None, "aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(plain, outer)
    got = gradients(checked, model)
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        # Where the casts are differs (the residual stream is float32 here), and bfloat16 rounds at
        # 2^-8: through three layers the gradients agree to a few per cent in the norm.
        assert (grad - expected[name]).norm() <= 0.1 * expected[name].norm(), name


def test_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=29, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().train()
    checked = copy.deepcopy(model)
    inputs = {"input_ids": IDS, "use_cache": False}
    expected = gradients(model, lambda ids: reference(model, **inputs).logits)
    checked.gradient_checkpointing_enable()
    moda_compile.convert(checked, None, inputs, "aot_eager")
    assert_equal(gradients(checked, lambda ids: checked(**inputs).logits), expected)


# --- guards -------------------------------------------------------------------------------------


def test_marks_inside_regions_guard() -> None:
    model = convert(decoder(WAYS["not reentrant"]), None, "eager")
    expected = model(IDS)
    with torch.compiler.set_stance("force_eager"), pytest.raises(NotRewrittenError):
        model(IDS)
    with pytest.raises(NotRewrittenError):
        model.blocks[1](torch.zeros(2, 9, 32).double(), *torch.zeros(2, 9, 8).double())
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)
    moda_compile.revert(model)
    torch.testing.assert_close(model(IDS), decoder()(IDS), **TIGHT)


def test_a_break_between_regions_is_refused() -> None:
    def broken(block: nn.Module, *args: Any) -> Tensor:
        x = checkpoint(block, *args, use_reentrant=False)
        torch._dynamo.graph_break()
        return x

    with pytest.raises(RewriteError, match=r"graph break.*test_checkpoint\.py:\d+"):
        convert(decoder(broken), None, "eager")


def test_explain_and_backend() -> None:
    report = moda_compile.explain(decoder(WAYS["nested"]), IDS)
    assert [a.block for a in report.attentions] == [f"blocks.{i}.attention" for i in range(3)]
    assert [a.reads for a in report.attentions] == [(), (0,), (0, 1)]
    model = decoder(WAYS["nested"])
    compiled = torch.compile(model, backend=Backend(compiler="eager"))
    torch.testing.assert_close(compiled(IDS), reference(decoder(), IDS), **TIGHT)


def test_other_regions_are_refused() -> None:
    def conditional(block: nn.Module, *args: Any) -> Tensor:
        x, cos, sin = args
        run = lambda x: block(x, cos, sin).clone()  # noqa: E731
        return torch.cond(x.sum() > -1e9, run, lambda x: x * 1.0, (x,))

    with pytest.raises(RewriteError, match="a region of its own") as caught:
        convert(decoder(conditional), None, "eager")
    assert "activation checkpoint" not in str(caught.value)


# --- memory and recomputation -------------------------------------------------------------------

BATCH, LENGTH, WIDTH, HEADS = 2, 64, 64, 4
UNIT = BATCH * LENGTH * WIDTH * 4  # bytes of one layer's K, or of one hidden state


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Of one training step.

    Attributes:
        saved: bytes kept for backward, but for parameters and inputs.
        products: matrix products in the backward's graph.
        in_forward, in_backward: runs of the attention's forward.
    """

    saved: int
    products: int
    in_forward: int
    in_backward: int


def count(
    monkeypatch: pytest.MonkeyPatch, way: str | None, layers: int, ffn_kv: Any | None
) -> Counted:
    """On the graphs that Inductor would generate code for, run as they are."""
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: Any, **_options: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    how = WAYS[way] if way is not None else plainly
    model = Decoder(how, layers=layers, width=WIDTH, heads=HEADS)
    ids = torch.randint(29, (BATCH, LENGTH))
    stock = functools.partial(compile_fx, inner_compile=keep)
    call: Callable[..., Any] = torch.compile(model, fullgraph=True, backend=stock)
    if ffn_kv is not None:
        call = moda_compile.convert(model, MoDAConfig(ffn_kv=ffn_kv), (ids,))
    saved: dict[int, int] = {}
    runs = [0]
    original = cpu.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        return original(*args, **kwargs)

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def step() -> tuple[int, int]:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = call(ids)
        in_forward = runs[0]
        output.sum().backward()
        return in_forward, runs[0] - in_forward

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "forward", forward)
        patch.setattr("torch._inductor.compile_fx.compile_fx_inner", keep)
        step()
        saved.clear()
        runs[0] = 0
        in_forward, in_backward = step()
    _, backward = graphs
    products = [
        n for n in backward.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)
    ]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), ids)}
    return Counted(
        saved=sum(n for at, n in saved.items() if at not in own),
        products=len(products),
        in_forward=in_forward,
        in_backward=in_backward,
    )


@pytest.mark.parametrize("way", ["not reentrant", "selective"])
def test_linear_in_depth(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer more costs what it costs without MoDA and its K and V, at most."""
    depths = (3, 4, 5)
    plain = {n: count(monkeypatch, way, n, None) for n in depths[:2]}
    moda = {n: count(monkeypatch, way, n, "none") for n in depths}
    steps = list(zip(depths, depths[1:], strict=False))
    rates = [(moda[b].saved - moda[a].saved) / (b - a) for a, b in steps]
    base = plain[4].saved - plain[3].saved
    print(
        f"{way}: saved a layer, in units of its K: {base / UNIT:.2f} plain, "
        f"{[round(r / UNIT, 2) for r in rates]} with MoDA; counted {moda}"
    )
    assert rates[0] == rates[1]
    assert rates[0] <= base + 2 * UNIT
    # A key is recomputed once at most, not once for each of its readers.
    products = [(moda[b].products - moda[a].products) / (b - a) for a, b in steps]
    assert products[0] == products[1]
    for n, counted in moda.items():
        # Full checkpointing runs each attention once more. Selective checkpointing with our
        # operator among those to be saved does not.
        again = 0 if way == "selective" else n
        assert (counted.in_forward, counted.in_backward) == (n, again)
