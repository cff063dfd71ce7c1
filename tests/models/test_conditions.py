"""A converted model under the things people train and serve with. See also test_training.py."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import moda_compile
from moda_compile import InputError, MoDAConfig, RewriteError
from moda_compile.backend import Backend
from moda_compile.testing import reference
from tests.models.cases import dynamo
from tests.models.checkpointed import WAYS, Decoder, decoder

IDS = torch.arange(18).view(2, 9) % 29
# float64 and values of order 1: 1e-10 leaves room for thousands of roundings.
TIGHT = dict(rtol=0.0, atol=1e-10)
CONFIGS = [MoDAConfig(ffn_kv=kind) for kind in ("none", "shared", "projected")]
BY_KIND = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.ffn_kv)


def convert(model: nn.Module, config: MoDAConfig | None = None, **options: Any) -> Any:
    options = {"example_inputs": (IDS,), "backend": "aot_eager"} | options
    return moda_compile.convert(model, config, **options)


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


def gradients(model: nn.Module, call: Callable[..., Tensor], *ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    for x in ids or (IDS,):
        loss_of(call(x)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expected_gradients(*ids: Tensor) -> dict[str, Tensor]:
    model = decoder()
    return gradients(model, lambda x: reference(model, x), *ids)


def twins(config: MoDAConfig) -> tuple[Any, Any]:
    """Two conversions of one model, with the same new parameters."""
    one, other = (convert(decoder(), config, backend="eager") for _ in range(2))
    other.load_state_dict(one.state_dict())
    return one, other


# --- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [None, "not reentrant"])
def test_autocast(dtype: torch.dtype, way: str | None) -> None:
    """No further from float64 than the eager oracle under the same autocast."""
    exact = expected_gradients()
    plain = decoder().float()
    model = convert(decoder(*([WAYS[way]] if way else [])).float())
    with torch.autocast("cpu", dtype=dtype):
        low = gradients(plain, lambda ids: reference(plain, ids).float())
        assert model(IDS).dtype == dtype
        got = gradients(model, lambda ids: model(ids).float())
    assert set(got) == set(exact)
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        scale = exact[name].norm()
        error, measure = ((g[name] - exact[name]).norm() / scale for g in (got, low))
        # Two softmaxes merged round differently from one, not more often: twice the oracle's error
        # is generous; the dtype's eps covers gradients that came out lucky there.
        assert error <= 2 * measure + torch.finfo(dtype).eps, f"{name}: {error} > {measure}"


def test_channels_of_different_dtype() -> None:
    """Norms in float32 and the rest in bfloat16, as mixed-precision checkpoints are loaded."""

    class Cast(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm.float()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.float()).to(x.dtype)

    def mixed() -> Decoder:
        model = decoder().bfloat16()
        for block in model.blocks:
            block.norms = nn.ModuleList(Cast(norm) for norm in block.norms)
        return model

    exact, plain, model = expected_gradients(), mixed(), convert(mixed())
    low = gradients(plain, lambda ids: reference(plain, ids).float())
    got = gradients(model, lambda ids: model(ids).float())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert {n for n, g in got.items() if g.dtype == torch.float32} == {
        f"blocks.{i}.norms.{j}.norm.weight" for i in range(3) for j in range(2)
    }
    eps = torch.finfo(torch.bfloat16).eps
    for name, grad in got.items():
        true = exact[name.replace(".norm.", ".")]
        error, measure = ((g[name] - true).norm() / true.norm() for g in (got, low))
        assert error <= 2 * measure + eps, name  # as in test_autocast
        assert grad.isfinite().all()


# --- dynamic shapes -----------------------------------------------------------------------------


def compilations(run: Callable[[], Any]) -> int:
    """How many graphs Dynamo compiles meanwhile. (It may start one over: one id, two calls.)"""
    made = set()
    original = Backend.__call__

    def counting(self: Backend, *args: Any, **kwargs: Any) -> Any:
        made.add(str(CompileContext.current_compile_id()))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "__call__", counting)
        run()
    return len(made)


@pytest.mark.parametrize(("changes", "way"), [
    ("length", None),
    ("batch", None),
    ("both", "not reentrant"),
])  # fmt: skip
def test_ten_sizes_in_two_compilations(changes: str, way: str | None) -> None:
    oracle = decoder()
    model = convert(decoder(*([WAYS[way]] if way else [])))

    def run() -> None:
        for n in range(3, 13):
            length = 7 if changes == "batch" else n
            batch = {"length": 2, "batch": n, "both": 15 - n}[changes]
            ids = torch.arange(batch * length).view(batch, length) % 29
            got = gradients(model, model, ids)
            want = gradients(oracle, lambda x: reference(oracle, x), ids)
            torch.testing.assert_close(got, want, **TIGHT)

    with dynamo(recompile_limit=2, fail_on_recompile_limit_hit=True):
        assert compilations(run) == 2


def test_dynamic_from_the_start() -> None:
    model, oracle = convert(decoder(), dynamic=True), decoder()

    def run() -> None:
        for batch, length in ((2, 9), (3, 5), (5, 12)):
            ids = torch.arange(batch * length).view(batch, length) % 29
            torch.testing.assert_close(model(ids), reference(oracle, ids), **TIGHT)

    assert compilations(run) == 1


def test_never_dynamic() -> None:
    model = convert(decoder(), dynamic=False)
    assert compilations(lambda: [model(IDS[:, :n]) for n in (4, 5, 6, 6)]) == 3


def test_transformers_of_ten_lengths() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=29, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().train()
    oracle = copy.deepcopy(model)
    inputs = {"input_ids": IDS, "use_cache": False}
    convert(model, example_inputs=inputs)

    def run() -> None:
        for n in range(3, 13):
            inputs["input_ids"] = torch.arange(2 * n).view(2, n) % 29
            want = gradients(oracle, lambda _: reference(oracle, **inputs).logits)
            got = gradients(model, lambda _: model(**inputs).logits)
            torch.testing.assert_close(got, want, **TIGHT)

    with dynamo(recompile_limit=2, fail_on_recompile_limit_hit=True):
        assert compilations(run) <= 2


# --- modes of autograd --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any], backend: str) -> None:
    """And with them again, before and behind."""
    model = convert(decoder(WAYS["not reentrant"]), backend=backend)
    expected, grads = reference(decoder(), IDS), expected_gradients()
    torch.testing.assert_close(gradients(model, model), grads, **TIGHT)
    with context():
        output = model(IDS)
    assert not output.requires_grad
    assert output.is_inference() == (context is torch.inference_mode)
    torch.testing.assert_close(output, expected.detach(), **TIGHT)
    torch.testing.assert_close(gradients(model, model), grads, **TIGHT)


# --- models in models, compiled twice -----------------------------------------------------------


class Bigger(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.scale = decoder, nn.Parameter(torch.tensor(2.0).double())

    def forward(self, ids: Tensor) -> Tensor:
        return (self.decoder((ids + 1) % 29) * self.scale).tanh()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_inside_a_bigger_module(outer: bool, compiled: bool) -> None:
    plain = Bigger(decoder())
    expected = gradients(plain, lambda ids: reference(plain, ids))
    model = Bigger(decoder())
    convert(model if outer else model.decoder)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    torch.testing.assert_close(gradients(model, call), expected, **TIGHT)


def test_compiled_before() -> None:
    """model.compile() belongs to the call, so the model itself is as it was; a wrapper isn't it."""
    model = decoder()
    model.compile(backend="aot_eager")
    torch.testing.assert_close(convert(model)(IDS), reference(decoder(), IDS), **TIGHT)
    with pytest.raises(InputError, match="_orig_mod"):
        convert(torch.compile(decoder()))


def test_blocks_compiled_before() -> None:
    model = decoder()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(convert(model)(IDS), reference(decoder(), IDS), **TIGHT)


# --- weights from elsewhere ---------------------------------------------------------------------


@BY_KIND
def test_functional_call(config: MoDAConfig) -> None:
    """Other weights, plain tensors, for one call; the model keeps its own."""
    model, other = twins(config)
    weights = {n: (p * 1.5).detach().requires_grad_() for n, p in model.named_parameters()}
    loss_of(functional_call(model, weights, (IDS,))).backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = gradients(other, other)
    assert len(expected) == len(weights)
    for name, grad in expected.items():
        torch.testing.assert_close(weights[name].grad, grad, **TIGHT)
    assert all(p.grad is None for p in model.parameters())


def test_functional_call_inside() -> None:
    """Dynamo sees only a dict of tensors then."""
    model = decoder()
    weights = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
    run = torch.compile(
        lambda w, ids: functional_call(model, w, (ids,)), backend=Backend(compiler="eager")
    )
    with torch.no_grad():
        got = run(weights, IDS)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(got, reference(model, IDS), **TIGHT)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def doubled(block: nn.Module) -> None:
    for layer in (block.attention.k, block.attention.q, block.ffn.up, block.ffn.gate):
        parametrize.register_parametrization(layer, "weight", Twice())


def weight_norm(block: nn.Module) -> None:
    for layer in (block.attention.k, block.attention.v, block.ffn.down):
        parametrizations.weight_norm(layer)


@BY_KIND
@pytest.mark.parametrize("how", [doubled, weight_norm])
@pytest.mark.parametrize("way", [None, "not reentrant"])
def test_parametrize(how: Callable[..., None], way: str | None, config: MoDAConfig) -> None:
    """The conversion with parametrized weights is that of the model with these weights."""
    model = decoder(*([WAYS[way]] if way else []))
    for block in model.blocks:
        how(block)
    convert(model, config, backend="eager")
    other = convert(decoder(), config, backend="eager")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            path, _, leaf = name.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(path), leaf))
    torch.testing.assert_close(model(IDS), other(IDS), **TIGHT)
    grads = gradients(model, model)
    assert len(grads) == len(list(model.parameters()))
    if how is doubled:
        want = gradients(other, other)
        for name, grad in grads.items():
            plain = name.replace(".parametrizations.weight.original", ".weight")
            factor = 2 if plain != name else 1
            torch.testing.assert_close(grad, factor * want[plain], **TIGHT)


def test_tied_embeddings() -> None:
    def tied() -> Decoder:
        model = decoder()
        model.head.weight = model.embedding.weight
        return model

    plain = tied()
    expected = gradients(plain, lambda ids: reference(plain, ids))
    model = convert(tied())
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in expected
    torch.testing.assert_close(gradients(model, model), expected, **TIGHT)


# --- training loops -----------------------------------------------------------------------------


def test_grad_scaler() -> None:
    """Scaled gradients are unscaled, and a step that overflowed is skipped."""
    model, plain = convert(decoder()), decoder()
    for m, call in ((model, model), (plain, lambda ids: reference(plain, ids))):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = {n: p.detach().clone() for n, p in m.named_parameters()}
        for factor in (1.0, float("inf"), 1.0):
            scaler.scale(loss_of(call(IDS)) * factor).backward()
            state = {n: p.detach().clone() for n, p in m.named_parameters()}
            scaler.step(optimizer)
            changed = any(not torch.equal(p, state[n]) for n, p in m.named_parameters())
            assert changed == (factor == 1.0)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 512.0
        assert all(not torch.equal(p, before[n]) for n, p in m.named_parameters())
    parameters = [dict(m.named_parameters()) for m in (model, plain)]
    torch.testing.assert_close(*parameters, **TIGHT)


@pytest.mark.slow
def test_ddp() -> None:
    """Two processes, gloo: the gradients are those of one process with both halves."""
    script = Path(__file__).with_name("ddp.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=900,
        cwd=script.parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 of 4" in done.stdout


# --- Inductor's modes and options ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(mode="fastest"), "fastest"),
        (dict(options={"no_such_option": 1}), "no_such_option"),
        (dict(mode="max-autotune", backend="aot_eager"), "Inductor's"),
        (dict(options={"max_autotune": True}, backend="eager"), "Inductor's"),
        (dict(backend="nvfuser"), "nvfuser"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    model = decoder()
    with pytest.raises(InputError, match=match):
        convert(model, **{"backend": "inductor"} | options)
    assert "forward" not in vars(model)


def test_options_count_for_idempotence() -> None:
    chosen = dict(backend="inductor", mode="max-autotune", options={"max_fusion_size": 7})
    model = convert(decoder(), **chosen)
    assert convert(model, **copy.deepcopy(chosen)) is model
    for other in (dict(mode=None), dict(options=None), dict(dynamic=True)):
        with pytest.raises(InputError, match="converted already"):
            convert(model, **chosen | other)


def test_options_reach_inductor(inductor_options: dict[str, Any]) -> None:
    options = {"max_fusion_size": 7, "max_autotune": False}
    convert(decoder(), backend="inductor", mode="max-autotune", options=options)(IDS)
    modes = torch._inductor.list_mode_options("max-autotune")
    assert {k: inductor_options[k] for k in modes} == modes | {"max_autotune": False}
    assert inductor_options["max_fusion_size"] == 7


# --- layer drop ---------------------------------------------------------------------------------


class Dropping(Decoder):
    """Skips layers at random in training; ``guarded`` asks for the probability first."""

    probability, guarded = 0.5, False

    def forward(self, ids: Tensor) -> Tensor:
        x, cos, sin = self.start(ids)
        for block in self.blocks:
            asks = self.training and not (self.guarded and self.probability == 0)
            if asks and torch.rand([]) < self.probability:
                continue
            x = block(x, cos, sin)
        return self.head(x)


def dropping() -> Dropping:
    model = Dropping().double()
    model.load_state_dict(decoder().state_dict())
    return model


def test_layer_drop_in_evaluation() -> None:
    model = dropping().eval()
    model.probability = 0.0  # so no layer is dropped by chance, but the branch is there
    convert(model)
    torch.testing.assert_close(model(IDS), reference(decoder(), IDS), **TIGHT)
    with pytest.raises(RewriteError, match="layer drop"):
        model.train()(IDS)


@pytest.mark.parametrize("probability", [0.5, 0.0])
def test_layer_drop_in_training_is_refused(probability: float) -> None:
    model = dropping()
    model.probability = probability
    with pytest.raises(RewriteError, match="depends on the values of a tensor") as caught:
        convert(model)
    assert caught.value.source is not None and __file__ in caught.value.source
    assert "set its probability to 0 or call model.eval()" in caught.value.fix
    assert "forward" not in vars(model)


def test_layer_drop_of_nothing() -> None:
    """The way out: what does not branch on a random number is one graph."""
    model = dropping()
    model.probability, model.guarded = 0.0, True
    torch.testing.assert_close(convert(model)(IDS), reference(decoder(), IDS), **TIGHT)


@pytest.mark.parametrize("drop", [0.0, 0.25])
@pytest.mark.parametrize("family", ["opt", "whisper"])
def test_transformers_with_layer_drop(family: str, drop: float) -> None:
    # Versions before branch on a random number even where no layer is to be dropped.
    transformers = pytest.importorskip("transformers", minversion="5.23")
    if family == "opt":
        config = transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=29,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, layerdrop=drop,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
        inputs = {"input_ids": IDS, "use_cache": False}
    else:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        config = transformers.WhisperConfig(
            d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=64,
            num_mel_bins=8, max_source_positions=9, dropout=0.0, encoder_layerdrop=drop,
        )  # fmt: skip
        model = WhisperEncoder(config)
        inputs = {"input_features": torch.randn(2, 8, 18).double()}
    model = model.double().train()
    plain = copy.deepcopy(model)
    expectation = pytest.raises(RewriteError, match="layer drop") if drop else nullcontext()
    with expectation:
        convert(model, example_inputs=inputs)
        want = gradients(plain, lambda _: reference(plain, **inputs)[0])
        torch.testing.assert_close(gradients(model, lambda _: model(**inputs)[0]), want, **TIGHT)
