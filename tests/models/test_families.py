"""Real families, unmodified: small random weights against the float64 oracle, all FFN slots.

The oracle intercepts the eager model's own attention calls; what an FFN's slot has to be is
spelled out here by hand, from the family's own modules.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("transformers").setLevel(logging.ERROR)

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import (  # noqa: E402
    apply_rotary_pos_emb,
)

import moda_compile  # noqa: E402
from moda_compile import MoDAConfig, RewriteError  # noqa: E402
from moda_compile.testing import FFNSlots, check_conversion, reference  # noqa: E402

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 8
WIDTH, VOCABULARY, BATCH, LENGTH = HEADS * HEAD_DIM, 37, 2, 7
KINDS = ("none", "shared", "projected")


# --- a GPT as nanoGPT writes it -----------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        k = k.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        q = q.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = CausalSelfAttention(width, heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Learned positions, fused qkv, tied head; the loss where targets are given."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.wpe = nn.Embedding(64, width)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        position = torch.arange(0, idx.shape[1], dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(position))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


# --- the families -------------------------------------------------------------------------------

#: (model, layer, FFN input, weight of key, weight of value) -> slot key, value [B, Hk, T, d];
#: the weights are None for ffn_kv="shared".
Slot = Callable[[Any, int, Tensor, Any, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: how to make it, where its FFNs are, and what they write."""

    make: Callable[[bool], nn.Module]
    ffn: str
    slot: Slot
    inputs: Callable[[], dict[str, Tensor]]
    kv_heads: int
    causal: bool = True


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * d] -> [B, H, T, d]."""
    return x.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2)


def split(attention: nn.Module, x: Tensor, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    """Features [B, T, Hk * d] of k and v, from the layer's own projections or from new weights."""
    if key is None:
        return attention.k_proj(x), attention.v_proj(x)
    return F.linear(x, key), F.linear(x, value)


def rotate(model: Any, key: Tensor, x: Tensor) -> Tensor:
    position = torch.arange(x.shape[1], device=x.device)[None]
    cos, sin = model.model.rotary_emb(x, position)
    return apply_rotary_pos_emb(key, key, cos, sin)[1]


def llama_slot(model: Any, layer: int, x: Tensor, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    k, v = split(model.model.layers[layer].self_attn, x, key, value)
    return rotate(model, by_head(k, KV_HEADS), x), by_head(v, KV_HEADS)


def qwen3_slot(model: Any, layer: int, x: Tensor, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    attention = model.model.layers[layer].self_attn
    k, v = split(attention, x, key, value)
    normed = attention.k_norm(k.unflatten(-1, (KV_HEADS, HEAD_DIM))).transpose(1, 2)
    return rotate(model, normed, x), by_head(v, KV_HEADS)


def olmo2_slot(model: Any, layer: int, x: Tensor, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    attention = model.model.layers[layer].self_attn
    k, v = split(attention, x, key, value)
    return rotate(model, by_head(attention.k_norm(k), KV_HEADS), x), by_head(v, KV_HEADS)


def gpt2_slot(model: Any, layer: int, x: Tensor, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    if key is None:  # GPT-2 keeps [in, out] weights
        fused = model.transformer.h[layer].attn.c_attn
        qkv = x @ fused.weight + fused.bias
        k, v = qkv[..., WIDTH : 2 * WIDTH], qkv[..., 2 * WIDTH :]
    else:
        k, v = F.linear(x, key), F.linear(x, value)
    return by_head(k, HEADS), by_head(v, HEADS)


def nanogpt_slot(model: Any, layer: int, x: Tensor, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    if key is None:
        fused = model.h[layer].attn.c_attn
        k = F.linear(x, fused.weight[WIDTH : 2 * WIDTH], fused.bias[WIDTH : 2 * WIDTH])
        v = F.linear(x, fused.weight[2 * WIDTH :], fused.bias[2 * WIDTH :])
    else:
        k, v = F.linear(x, key), F.linear(x, value)
    return by_head(k, HEADS), by_head(v, HEADS)


def vit_slot(model: Any, layer: int, x: Tensor, key: Any, value: Any) -> tuple[Tensor, Tensor]:
    if key is None:
        attention = model.vit.layers[layer].attention
        k, v = attention.k_proj(x), attention.v_proj(x)
    else:
        k, v = F.linear(x, key), F.linear(x, value)
    return by_head(k, HEADS), by_head(v, HEADS)


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(training: bool) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen3(training: bool) -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=HEAD_DIM))


def olmo2(training: bool) -> nn.Module:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES))


def gpt2(training: bool) -> nn.Module:
    drop = {f"{name}_pdrop": 0.0 for name in ("attn", "embd", "resid")} if training else {}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=64,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
            **drop,
        )
    )


def vit(training: bool) -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=12,
            patch_size=4,
            num_labels=5,
            attn_implementation="sdpa",
        )
    )


def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)}


def lm_inputs() -> dict[str, Any]:
    return tokens() | {"use_cache": False}


def nano_inputs() -> dict[str, Tensor]:
    ids = tokens()["input_ids"]
    return {"idx": ids, "targets": ids.roll(-1, 1)}


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(BATCH, 3, 12, 12, generator=generator)}


DECODER = "model.layers.{}.mlp"
FAMILIES = {
    "nanogpt": Family(
        make=lambda training: NanoGPT(),
        ffn="h.{}.mlp",
        slot=nanogpt_slot,
        inputs=nano_inputs,
        kv_heads=HEADS,
    ),
    "llama": Family(make=llama, ffn=DECODER, slot=llama_slot, inputs=lm_inputs, kv_heads=KV_HEADS),
    "qwen3": Family(make=qwen3, ffn=DECODER, slot=qwen3_slot, inputs=lm_inputs, kv_heads=KV_HEADS),
    "olmo2": Family(make=olmo2, ffn=DECODER, slot=olmo2_slot, inputs=lm_inputs, kv_heads=KV_HEADS),
    "gpt2": Family(
        make=gpt2, ffn="transformer.h.{}.mlp", slot=gpt2_slot, inputs=lm_inputs, kv_heads=HEADS
    ),
    "vit": Family(
        make=vit,
        ffn="vit.layers.{}.mlp",
        slot=vit_slot,
        inputs=images,
        kv_heads=HEADS,
        causal=False,
    ),
}


def build(family: Family, training: bool) -> nn.Module:
    """The model with weights lively enough that norms, biases and attention matter."""
    torch.manual_seed(0)
    model = family.make(training)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1.2 / math.sqrt(WIDTH))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train(training)


def slots_of(family: Family, kind: str) -> Any:
    """The FFN oracle: see `FFNSlotsFactory`."""
    if kind == "none":
        return None

    def factory(twin: nn.Module, new: Mapping[str, Tensor]) -> FFNSlots:
        def key_value(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
            weights: list[Any] = [None, None]
            if kind == "projected":
                path = family.ffn.format(layer)
                weights = [new[f"{path}.moda_{name}_weight"] for name in ("key", "value")]
            return family.slot(twin, layer, x, *weights)

        paths = {path for path, _ in twin.named_modules()}
        layers = sum(family.ffn.format(i) in paths for i in range(LAYERS))
        return FFNSlots(
            modules=[family.ffn.format(i) for i in range(layers - 1)], key_value=key_value
        )

    return factory


@pytest.mark.parametrize("ffn_kv", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, training: bool, ffn_kv: Any) -> None:
    """Outputs and all gradients equal the oracle's; converts once, reverts exactly, explains."""
    family = FAMILIES[name]
    model = build(family, training)
    # check_conversion's default budget: its reasons are in Budget's docstring.
    compared = check_conversion(
        model,
        family.inputs(),
        MoDAConfig(ffn_kv=ffn_kv),
        # Tracing is what takes the time here; AOTAutograd sees the fullest of the graphs.
        backend="aot_eager" if training and ffn_kv == "projected" else "eager",
        ffn_slots=slots_of(family, ffn_kv),
    )
    names = {c.name for c in compared}
    new = {f"gradient of {family.ffn.format(i)}.moda_key_weight" for i in range(LAYERS - 1)}
    assert (new <= names) == (ffn_kv == "projected")
    assert len(names) >= 1 + len(list(model.parameters()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_is_another_model(name: str) -> None:
    """Else the comparisons above would say nothing about depth."""
    family = FAMILIES[name]
    model = build(family, training=False)
    inputs = family.inputs()

    def logits(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output.logits

    plain = logits(model(**inputs))
    seen = [plain]
    for kind in ("none", "shared"):
        factory = slots_of(family, kind)
        slots = None if factory is None else factory(model, {})
        moda = logits(reference(model, **inputs, ffn_slots=slots))
        # Logits are of size 1; rounding in float32 would be 1e-6 of it.
        assert all((moda - other).abs().max() > 1e-2 for other in seen)
        seen.append(moda)


@pytest.mark.parametrize("name", FAMILIES)
def test_explain(name: str) -> None:
    """Slots in order, the last layer writes none, and no slot holds repeated heads."""
    family = FAMILIES[name]
    report = moda_compile.explain(
        build(family, training=True), config=MoDAConfig(ffn_kv="shared"), **family.inputs()
    )
    assert not report.refusals
    assert [(a.heads, a.kv_heads, a.head_dim) for a in report.attentions] == [
        (HEADS, family.kv_heads, HEAD_DIM)
    ] * LAYERS
    assert [a.causal for a in report.attentions] == [family.causal] * LAYERS
    assert [a.pattern for a in report.attentions] == ["sdpa"] * LAYERS
    assert [a.reads for a in report.attentions] == [(), (0, 1), (0, 1, 2, 3)]
    assert [a.writes for a in report.attentions] == [(0, 1), (2, 3), ()]
    assert all(a.source and a.source.rpartition(":")[2].isdigit() for a in report.attentions)
    layers = [a.block for a in report.attentions]
    assert [path.count(f".{i}") for i, path in enumerate(layers)] == [1] * LAYERS


# --- Llama's ways to a mask ---------------------------------------------------------------------


def explain_llama(training: bool, **inputs: Any) -> Any:
    return moda_compile.explain(build(FAMILIES["llama"], training), **tokens(), **inputs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_llama_without_a_mask(training: bool, use_cache: bool) -> None:
    """In training transformers builds a causal mask tensor and repeats KV; else neither."""
    report = explain_llama(training, use_cache=use_cache, attention_mask=None)
    assert [(a.heads, a.kv_heads, a.causal) for a in report.attentions] == [
        (HEADS, KV_HEADS, True)
    ] * LAYERS


def test_llama_with_a_cache_computes_the_same() -> None:
    """The first call with a fresh cache is an ordinary forward pass."""
    family = FAMILIES["llama"]
    check_conversion(
        build(family, training=False),
        tokens(),
        MoDAConfig(ffn_kv="shared"),
        backend="eager",
        ffn_slots=slots_of(family, "shared"),
    )


def test_llama_with_a_padding_mask_is_refused() -> None:
    """A user's mask is data: the graph does not say that it is causal."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    report = explain_llama(True, use_cache=False, attention_mask=mask)
    assert not report.attentions
    assert len(report.refusals) == LAYERS
    assert "values of an input" in str(report.refusals[0].refusal)
    assert "attention_mask=None" in str(report.refusals[0].refusal)
    model = build(FAMILIES["llama"], True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(RewriteError, match="values of an input"):
        moda_compile.convert(
            model, example_inputs=tokens() | {"use_cache": False, "attention_mask": mask}
        )
    assert "forward" not in vars(model)
    assert list(model.state_dict()) == list(before)


def test_gpt2_with_its_default_dropout_is_refused_in_training() -> None:
    """And says so by name; in evaluation (above) it converts."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64
        )
    ).train()
    with pytest.raises(RewriteError, match=r"attention dropout \(dropout_p=0.1\)") as caught:
        moda_compile.convert(model, example_inputs=lm_inputs(), backend="eager")
    assert caught.value.block == "transformer.h.0.attn"
    assert "forward" not in vars(model)


def test_llama_through_inductor() -> None:
    """One family through the real compiler, in training; two layers, as compiling takes long."""
    family = FAMILIES["llama"]
    model = build(family, training=True)
    del model.model.layers[2:]
    check_conversion(
        model,
        family.inputs(),
        MoDAConfig(ffn_kv="projected"),
        backend="inductor",
        ffn_slots=slots_of(family, "projected"),
    )
