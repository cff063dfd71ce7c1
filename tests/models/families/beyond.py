"""More families of transformers: relative biases, several stacks, hybrids, other normalisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models.families import twins
from tests.models.families.row import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    SIZES,
    VOCABULARY,
    WIDTH,
    Family,
    Padding,
    encoder,
    language,
    padding_mask,
    repeated,
    token_ids,
    transformers_model,
)

GQA: dict[str, Any] = {**SIZES, "num_key_value_heads": KV_HEADS}
FOUR: dict[str, Any] = {**GQA, "num_hidden_layers": 4}
FALCON: dict[str, Any] = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
BERT: dict[str, Any] = {**SIZES, "type_vocab_size": 2, "pad_token_id": 1}
BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
TWIN = "twin"


def t5_batch(padding: Padding) -> dict[str, Any]:
    """Source and target of different lengths."""
    batch = {"input_ids": token_ids(), "decoder_input_ids": token_ids(5), "use_cache": False}
    if padding == "padded":
        batch["attention_mask"] = padding_mask("padded")
    return batch


def pictures(padding: Padding) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator)}


def long_text(padding: Padding) -> dict[str, Any]:
    return {"input_ids": token_ids(16)}


def or_twin(
    make: Callable[[str, bool], nn.Module], attention: str, forward: Any
) -> Callable[[str, bool], nn.Module]:
    """`make`, where "twin" is another implementation: one through SDPA; see `twins`."""

    def made(implementation: str, training: bool) -> nn.Module:
        if implementation != TWIN:
            return make(implementation, training)
        model = make("eager", training)
        cls = next(type(m) for m in model.modules() if type(m).__name__ == attention)
        return twins.with_sdpa(model, cls, forward)

    return made


def row(name: str, title: str, make: Any, **options: Any) -> Family:
    return Family(
        **{"name": name, "title": title, "library": "transformers", "make": make,
           "inputs": language, **options}
    )  # fmt: skip


BEYOND = (
    row(
        "t5", "T5 (encoder and decoder, relative bias)",
        transformers_model("T5ForConditionalGeneration", "T5Config", dropouts=("dropout_rate",),
                           vocab_size=VOCABULARY, d_model=WIDTH, d_kv=HEAD_DIM, d_ff=HIDDEN,
                           num_layers=LAYERS, num_heads=HEADS, decoder_start_token_id=0),
        inputs=t5_batch, padded=True, stacks=(0, 0, 0, 1, None, 1, None, 1, None),
    ),
    # transformers 5.23.0 adds ALiBi twice where Falcon's attention is written by hand: its "eager"
    # and "sdpa" are two models, and none is the other's oracle.
    row(
        "falcon_alibi", "Falcon (ALiBi, one KV head)",
        transformers_model("FalconForCausalLM", "FalconConfig", **FALCON, alibi=True,
                           parallel_attn=False),
        padded=True, implementations=("sdpa",),
    ),
    row(
        "falcon", "Falcon (rotary, one KV head, parallel blocks)",
        transformers_model("FalconForCausalLM", "FalconConfig", **FALCON), padded=True,
    ),
    row(
        "bloom", "BLOOM (ALiBi)",
        or_twin(transformers_model("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY,
                                   hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
                "BloomAttention", twins.bloom),
        implementations=("eager",), oracle=TWIN, padded=True,
    ),
    row(
        "deberta_v2", "DeBERTa-v2 (disentangled attention)",
        or_twin(transformers_model("DebertaV2ForMaskedLM", "DebertaV2Config", **BERT,
                                   dropouts=BERT_DROPOUTS, relative_attention=True,
                                   position_buckets=4, pos_att_type=["p2c", "c2p"]),
                "DisentangledSelfAttention", twins.deberta_v2),
        inputs=encoder, implementations=("eager",), oracle=TWIN,
    ),
    row(
        "deepseek_v3", "DeepSeek-V3 (latent attention, values narrower than keys)",
        transformers_model("DeepseekV3ForCausalLM", "DeepseekV3Config",
                           **{**SIZES, "num_key_value_heads": HEADS}, kv_lora_rank=16,
                           q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
                           n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
                           moe_intermediate_size=16, first_k_dense_replace=2),
        oracle="sdpa+batched_mm", padded=True, no_ffn_slots="changed in place",
        shapes=((HEADS, HEADS, 12, True),) * LAYERS,
    ),
    row(
        "qwen3_next", "Qwen3-Next (linear and gated attention)",
        transformers_model("Qwen3NextForCausalLM", "Qwen3NextConfig", **FOUR, head_dim=HEAD_DIM,
                           linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                           linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2,
                           moe_intermediate_size=16, shared_expert_intermediate_size=16,
                           layer_types=["linear_attention", "full_attention"] * 2),
        oracle="sdpa+batched_mm", stacks=(0, 0),
        shapes=repeated(HEADS, KV_HEADS, causal=True, layers=2),
    ),
    row(
        "jamba", "Jamba (attention and Mamba)",
        transformers_model("JambaForCausalLM", "JambaConfig", **{**FOUR, "pad_token_id": 0},
                           attn_layer_period=2, attn_layer_offset=1, num_experts=2,
                           use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4),
        oracle="sdpa+batched_mm", stacks=(0, 0),
        shapes=repeated(HEADS, KV_HEADS, causal=True, layers=2),
    ),
)  # fmt: skip
