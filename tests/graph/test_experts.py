"""Mixtures of experts: each way to run them is one FFN of its layer, and nothing else is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("transformers").setLevel(logging.ERROR)

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import moda_compile  # noqa: E402
from moda_compile import MoDAConfig, fx  # noqa: E402
from moda_compile.patterns import experts, ffn  # noqa: E402
from moda_compile.testing import FFNSlots, reference  # noqa: E402
from tests.graph.graphs import WIDTH, Attend, B, T, trace  # noqa: E402

EXPERTS, TOP, INNER = 4, 2, 6


# --- routers and experts, by hand ---------------------------------------------------------------


def softmax_then_pick(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, picked = torch.softmax(logits.float(), -1).topk(TOP, dim=-1)
    return weights / weights.sum(-1, keepdim=True), picked


def pick_then_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, picked = torch.topk(logits, TOP)
    return weights.softmax(-1), picked


def in_groups(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid scores; the best of two groups of experts, then the best experts of that."""
    scores = logits.sigmoid()
    biased = scores + torch.linspace(0, 0.1, EXPERTS)
    grouped = biased.view(-1, 2, EXPERTS // 2)
    best = grouped.topk(1, dim=-1)[0].sum(-1).topk(1, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1)
    allowed = mask.unsqueeze(-1).expand(grouped.shape).reshape(biased.shape)
    picked = biased.masked_fill(~allowed.bool(), 0.0).topk(TOP, dim=-1, sorted=False)[1]
    return scores.gather(1, picked) * 2.5, picked


class Mixture(nn.Module):
    """x [B, T, WIDTH] -> the same; how the experts run is up to a subclass."""

    def __init__(self, pick: Callable[[Tensor], tuple[Tensor, Tensor]] = softmax_then_pick) -> None:
        super().__init__()
        self.pick = pick
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, picked = self.pick(self.gate(flat))
        return self.run(flat, weights.to(x.dtype), picked).view(x.shape)

    def run(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        raise NotImplementedError


class GatheredWeights(Mixture):
    def run(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("nd,nkdf->nkf", flat, self.up[picked]))
        return torch.einsum("nkf,nkfd,nk->nd", hidden, self.down[picked], weights)


class AllOfThem(Mixture):
    """Every expert sees every token; a table holds a zero for those that were not picked."""

    def run(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        table = torch.zeros(flat.shape[0], EXPERTS).scatter_(1, picked, weights)
        made = torch.bmm(F.gelu(torch.matmul(flat, self.up)), self.down)
        return (made * table.t().unsqueeze(-1)).sum(0)


class WeighedInputs(Mixture):
    """As Llama 4: the scores scale what the experts read."""

    def run(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        table = torch.zeros(flat.shape[0], EXPERTS).scatter_(1, picked, weights)
        routed = flat.repeat(EXPERTS, 1) * table.t().reshape(-1, 1)
        inner = F.silu(torch.bmm(routed.view(EXPERTS, -1, WIDTH), self.up))
        return torch.bmm(inner, self.down).sum(0)


class Dispatched(Mixture):
    """As in GShard: products with a one-hot table bring tokens to experts and back."""

    def run(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        table = F.one_hot(picked, EXPERTS).to(flat.dtype)
        there = torch.einsum("nke,nd->end", table, flat)
        made = torch.einsum("enf,efd->end", F.relu(torch.bmm(there, self.up)), self.down)
        return torch.einsum("end,nke,nk->nd", made, table, weights)


class Modules(Mixture):
    """Experts that are modules; ``per`` says on which tokens one runs."""

    def __init__(self, pick: Any = softmax_then_pick, *, per: str) -> None:
        super().__init__(pick)
        del self.up, self.down
        self.per = per
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.SiLU(), nn.Linear(INNER, WIDTH))
            for _ in range(EXPERTS)
        )

    def run(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            if self.per == "all":
                share = (weights * (picked == number)).sum(-1, keepdim=True)
                result = result + expert(flat) * share
            else:
                token, place = torch.where(picked == number)
                result.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return result


class Shared(Mixture):
    """A gated network beside the routed ones, itself gated by the token; added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.routed = GatheredWeights()
        self.beside = nn.ModuleList([nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)])
        self.share = nn.Linear(WIDTH, 1)
        del self.gate, self.up, self.down

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.beside
        made = self.routed(x)
        made += self.share(x).sigmoid() * down(F.silu(gate(x)) * up(x))
        return made


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "gathered weights": GatheredWeights,
    "softmax last": lambda: GatheredWeights(pick_then_softmax),
    "groups": lambda: GatheredWeights(in_groups),
    "all": AllOfThem,
    "weighed inputs": WeighedInputs,
    "dispatched": Dispatched,
    "modules, all": lambda: Modules(per="all"),
    "modules, own tokens": lambda: Modules(in_groups, per="own"),
    "shared": Shared,
}


class Layer(nn.Module):
    """Attention and ``mlp``, with the norm in front of it, or behind the sum, or in parallel."""

    def __init__(self, mlp: nn.Module, kind: str = "pre") -> None:
        super().__init__()
        self.kind, self.mlp = kind, mlp
        self.attention = Attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def attended(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "parallel":
            normed = self.one(x)
            return x + (self.attended(normed) + self.mlp(normed))
        if self.kind == "post":
            x = self.one(x + self.attended(x))
            return self.two(x + self.mlp(x))
        x = x + self.attended(self.one(x))
        return x + self.mlp(self.two(x))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def found_in(model: nn.Module) -> list[ffn.FFN]:
    # Tokens per expert are a number that only the run knows.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return ffn.find(trace(model, torch.randn(B, T, WIDTH)).graph)


@pytest.mark.parametrize("kind", ["pre", "post", "parallel"])
@pytest.mark.parametrize("name", MIXTURES)
def test_one_ffn_a_layer(name: str, kind: str) -> None:
    found = found_in(Stack([Layer(MIXTURES[name](), kind) for _ in range(2)]))
    assert [f.path for f in found] == ["layers.0.mlp", "layers.1.mlp"]
    for one in found:
        assert fx.calls(one.input, "layer_norm")
        assert fx.value(one.input).shape == (B, T, WIDTH)
        assert fx.value(one.weight).shape[0] in (EXPERTS, INNER, 5)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_output_comes_from_input_and_picks(name: str) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = trace(Layer(MIXTURES[name]()), torch.randn(B, T, WIDTH)).graph
    (one,) = ffn.find(graph)
    picks = [n for n in graph.nodes if fx.calls(n, "topk")]
    reached = fx.reach(graph.nodes, [one.input, *picks])
    assert reached[one.node] == (1 << (1 + len(picks))) - 1
    (last,) = [n for n in graph.nodes if n.op == "output"]
    assert one.node in fx.upstream(last, lambda n: False)


def test_a_router_in_a_wider_dtype() -> None:
    """It reads a cast of what the experts read; a slot's weights are multiplied with the latter."""

    class Wide(GatheredWeights):
        def forward(self, x: Tensor) -> Tensor:
            logits = F.linear(x.float().view(-1, WIDTH), self.gate.weight.float())
            weights, picked = self.pick(logits)
            return self.run(x.view(-1, WIDTH), weights.to(x.dtype), picked).view(x.shape)

    class Narrowed(Layer):
        def forward(self, x: Tensor) -> Tensor:
            narrow = F.layer_norm(x, (WIDTH,)).to(torch.bfloat16)
            return x + self.mlp(narrow)

    layer = Narrowed(Wide().bfloat16())
    (one,) = ffn.find(trace(layer, torch.randn(B, T, WIDTH)).graph)
    assert fx.value(one.input).dtype == fx.value(one.weight).dtype == torch.bfloat16
    assert fx.value(one.input).shape == (B, T, WIDTH)


# --- near misses --------------------------------------------------------------------------------


class OneLayer(Mixture):
    """Picks among vectors, not networks: a codebook."""

    def run(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        return (self.up[picked].sum(-1) * weights.unsqueeze(-1)).sum(1)


class OtherScores(Mixture):
    """Scores are a product of two activations, as an indexer's are: no router."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, picked = self.pick(self.gate(flat) @ self.other(flat)[:EXPERTS, :].t())
        return self.gathered(flat, weights, picked).view(x.shape)

    def gathered(self, flat: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("nd,nkdf->nkf", flat, self.up[picked]))
        return torch.einsum("nkf,nkfd,nk->nd", hidden, self.down[picked], weights)


class TwoInputs(OtherScores):
    """Two routers that read different hidden states."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, picked = self.pick(self.gate(flat) + self.other(flat.cumsum(0)))
        return self.gathered(flat, weights, picked).view(x.shape)


class Narrower(Mixture):
    """What comes back is no hidden state."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, picked = self.pick(self.gate(flat))
        hidden = F.silu(torch.einsum("nd,nkdf->nkf", flat, self.up[picked]))
        made = torch.einsum("nkf,nkfd,nk->nd", hidden, self.down[picked], weights)
        return made.mean(-1).view(*x.shape[:2], 1)


@pytest.mark.parametrize("mixture", [OneLayer, OtherScores, TwoInputs, Narrower])
def test_no_mixture(mixture: type[nn.Module]) -> None:
    module = mixture()
    if isinstance(module, OneLayer):
        module.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2))
    graph = trace(Layer(module), torch.randn(B, T, WIDTH)).graph
    assert experts.find(graph) == []
    assert ffn.find(graph) == []


def test_whole_blocks_on_some_tokens() -> None:
    """Mixture-of-depths routing picks tokens, and its branch holds an attention."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.block = nn.Linear(WIDTH, 1), Layer(nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            weights, picked = self.gate(x).squeeze(-1).topk(2, dim=1)
            index = picked.unsqueeze(-1).expand(-1, -1, WIDTH)
            made = self.block(x.gather(1, index)) * weights.unsqueeze(-1)
            return x.scatter_add(1, index, made)

    assert experts.find(trace(Some(), torch.randn(B, T, WIDTH)).graph) == []


def test_sampling_picks_no_experts() -> None:
    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)))
            self.head = nn.Linear(WIDTH, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)).softmax(-1).topk(5, dim=-1)[1]

    assert [f.path for f in found_in(Sampled())] == ["layer.mlp"]


def test_networks_over_one_input_are_one_if_they_meet() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.mlp = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)) for _ in range(3)
            )
            self.next = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            normed = self.norm(x)
            one, two, head = (mlp(normed) for mlp in self.mlp)
            x = x + one
            return self.next(x + two * 0.5), head

    first, second = found_in(Beside())
    assert {first.path, second.path} == {"mlp", "mlp.2"}


# --- transformers -------------------------------------------------------------------------------

BASE = dict(
    vocab_size=32, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts_per_tok=2,
)  # fmt: skip
GROUPED = dict(n_routed_experts=4, n_group=2, topk_group=1, n_shared_experts=1,
               moe_intermediate_size=24, first_k_dense_replace=1)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "qwen2 moe": ("Qwen2MoeConfig", dict(num_experts=4, moe_intermediate_size=24,
                                         shared_expert_intermediate_size=16)),
    "qwen3 moe": ("Qwen3MoeConfig", dict(num_experts=4, moe_intermediate_size=24, head_dim=8)),
    "olmoe": ("OlmoeConfig", dict(num_experts=4)),
    "deepseek v3": ("DeepseekV3Config", GROUPED | dict(
        q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        num_key_value_heads=4)),
    "glm4 moe": ("Glm4MoeConfig", GROUPED | dict(head_dim=8)),
    "phimoe": ("PhimoeConfig", dict(num_local_experts=4)),
    "granite moe": ("GraniteMoeConfig", dict(num_local_experts=4)),
    "gpt-oss": ("GptOssConfig", dict(num_local_experts=4, head_dim=8)),
    "llama 4": ("Llama4TextConfig", dict(num_local_experts=4, head_dim=8, intermediate_size_mlp=24,
                                         interleave_moe_layer_step=2, attention_chunk_size=8,
                                         num_experts_per_tok=1)),
}  # fmt: skip
MLPS = {"llama 4": "feed_forward", "granite moe": "block_sparse_moe"}
IDS = torch.arange(10).view(2, 5) + 1


def language_model(family: str, runs: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**(BASE | options))
    torch.manual_seed(0)
    attention = "eager" if family == "gpt-oss" else "sdpa"
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation=runs
    )


@pytest.mark.parametrize("runs", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers(family: str, runs: str) -> None:
    if (family, runs) == ("llama 4", "grouped_mm"):
        runs = "eager"  # its experts always run as one batched product
    model = language_model(family, runs)
    found = ffn.find(trace(model, IDS).graph)
    prefix = MLPS.get(family, "mlp")
    assert [f.path for f in found] == [f"model.layers.{i}.{prefix}" for i in range(3)]
    for one in found:
        assert fx.value(one.input).shape == (2, 5, 32)
        assert model.get_submodule(one.path) is not None


# --- whole conversions --------------------------------------------------------------------------


def slots_of(model: Any, converted: Any, kind: str) -> FFNSlots | None:
    """What an FFN's slot has to be, from the model's own modules."""
    if kind == "none":
        return None
    from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

    weights = dict(converted.named_parameters())

    def key_value(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        attention = model.model.layers[layer].self_attn
        key_weight, value_weight = attention.k_proj.weight, attention.v_proj.weight
        key_bias, value_bias = attention.k_proj.bias, attention.v_proj.bias
        if kind == "projected":
            prefix = f"model.layers.{layer}.mlp.moda"
            key_weight, value_weight = (
                weights[f"{prefix}_key_weight"],
                weights[f"{prefix}_value_weight"],
            )
            key_bias = value_bias = None
        key = F.linear(x, key_weight, key_bias)
        if hasattr(attention, "k_norm") and attention.k_norm.weight.shape[0] == key.shape[-1]:
            key = attention.k_norm(key)
        key, value = (
            h.unflatten(-1, (-1, 8)).transpose(1, 2)
            for h in (key, F.linear(x, value_weight, value_bias))
        )
        cos, sin = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        _, key = apply_rotary_pos_emb(key, key, cos, sin)
        return key, value

    return FFNSlots(modules=["model.layers.0.mlp", "model.layers.1.mlp"], key_value=key_value)


@pytest.mark.parametrize("kind", ["none", "shared", "projected"])
@pytest.mark.parametrize(
    ("family", "runs"),
    [("mixtral", "batched_mm"), ("qwen2 moe", "grouped_mm"), ("olmoe", "batched_mm")],
)
def test_conversion(family: str, runs: str, kind: Any) -> None:
    """Outputs and gradients against an oracle that intercepts the eager model's attention calls."""
    model = language_model(family, runs).double()
    oracle = language_model(family, "batched_mm").double()  # grouped_mm has no float64 in eager
    oracle.load_state_dict(model.state_dict())
    moda_compile.convert(
        model, MoDAConfig(ffn_kv=kind), example_inputs={"input_ids": IDS}, backend="eager"
    )
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    slots = slots_of(oracle, model, kind)
    expected = reference(oracle, input_ids=IDS, ffn_slots=slots).logits
    added = {n: p for n, p in model.named_parameters() if "moda_" in n}
    own = [p for p in model.parameters() if not any(p is a for a in added.values())]
    wanted = torch.autograd.grad(expected.square().mean(), [*oracle.parameters(), *added.values()])
    # float64, values of order 1, some thousand roundings.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    for got, want in zip([*own, *added.values()], wanted, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=0, atol=1e-10)
    assert (len(added) > 0) == (kind == "projected")
    plain = oracle(input_ids=IDS).logits
    assert (plain - expected).abs().max() > 1e-4  # else the test could not fail
