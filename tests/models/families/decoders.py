"""Causal language models of transformers."""

from __future__ import annotations

from typing import Any

from tests.models.families.row import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    SIZES,
    VOCABULARY,
    WIDTH,
    WINDOW,
    Family,
    language,
    repeated,
    transformers_model,
)
from tests.models.families.slots import Heads, fused, separate

GQA: dict[str, Any] = {**SIZES, "num_key_value_heads": KV_HEADS}
LAYER = "model.layers.{}"
LLAMA_HEADS = Heads(
    attention=f"{LAYER}.self_attn", ffn=f"{LAYER}.mlp", replace=separate("k_proj", "v_proj")
)
CAUSAL = repeated(HEADS, KV_HEADS, causal=True)


def decoder(
    name: str, title: str, prefix: str, *, heads: Heads | None = LLAMA_HEADS, shapes: Any = CAUSAL,
    dropouts: tuple[str, ...] = (), sizes: dict[str, Any] = GQA, config: str | None = None,
    model: str | None = None, oracle: str = "", no_ffn_slots: str = "",
    **options: Any,
) -> Family:  # fmt: skip
    """A row for ``<prefix>ForCausalLM``."""
    make = transformers_model(
        model or f"{prefix}ForCausalLM", config or f"{prefix}Config", dropouts=dropouts,
        **{**sizes, **options},
    )  # fmt: skip
    return Family(
        name=name, title=title, library="transformers", make=make, inputs=language,
        padded=True, heads=heads, shapes=shapes,
        drops=bool(dropouts),
        oracle=oracle, no_ffn_slots=no_ffn_slots,
    )  # fmt: skip


GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
    "n_positions": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def _rows(first: int, width: int) -> list[int]:
    return list(range(first, first + width))


def _per_head(part: int) -> list[int]:
    """Rows of q (0), k (1) or v (2) in a projection laid out [H, 3, d]."""
    return [(3 * h + part) * HEAD_DIM + i for h in range(HEADS) for i in range(HEAD_DIM)]


KV_WIDTH = KV_HEADS * HEAD_DIM

DECODERS = (
    decoder("llama", "Llama", "Llama"),
    decoder("mistral", "Mistral (sliding window)", "Mistral", sliding_window=WINDOW,
            shapes=repeated(HEADS, KV_HEADS, causal=False)),
    decoder("qwen2", "Qwen2", "Qwen2"),
    decoder("qwen3", "Qwen3", "Qwen3", head_dim=HEAD_DIM),
    decoder("olmo2", "OLMo 2", "Olmo2"),
    decoder("smollm3", "SmolLM3 (a layer without rotary)", "SmolLM3", no_rope_layers=[1, 0, 1]),
    decoder("phi3", "Phi-3 (fused projections, partial rotary)", "Phi3",
            original_max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                             "partial_rotary_factor": 0.5},
            heads=Heads(
                attention=f"{LAYER}.self_attn", ffn=f"{LAYER}.mlp",
                replace=fused("qkv_proj", _rows(WIDTH, KV_WIDTH),
                              _rows(WIDTH + KV_WIDTH, KV_WIDTH)),
            )),
    decoder("granite", "Granite (its own scales)", "Granite", attention_multiplier=0.2,
            residual_multiplier=0.7, embedding_multiplier=1.5, logits_scaling=2.0),
    decoder("gemma3", "Gemma 3 (text; sliding and full layers)", "Gemma3",
            config="Gemma3TextConfig", head_dim=HEAD_DIM, query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            shapes=tuple((HEADS, KV_HEADS, HEAD_DIM, causal) for causal in (False, True, False))),
    decoder("mixtral", "Mixtral (mixture of experts)", "Mixtral", num_local_experts=4,
            num_experts_per_tok=2, oracle="sdpa+batched_mm"),
    decoder("gpt2", "GPT-2", "GPT2", config="GPT2Config", model="GPT2LMHeadModel", sizes=GPT2_SIZES,
            dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
            shapes=repeated(HEADS, HEADS, causal=True),
            heads=Heads(
                attention="transformer.h.{}.attn", ffn="transformer.h.{}.mlp",
                replace=fused("c_attn", _rows(WIDTH, WIDTH), _rows(2 * WIDTH, WIDTH),
                              transposed=True),
            )),
    decoder("gpt_neox", "GPT-NeoX (parallel blocks, partial rotary)", "GPTNeoX", sizes=dict(SIZES),
            rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                             "partial_rotary_factor": 0.5},
            shapes=repeated(HEADS, HEADS, causal=True),
            heads=Heads(
                attention="gpt_neox.layers.{}.attention", ffn="gpt_neox.layers.{}.mlp",
                replace=fused("query_key_value", _per_head(1), _per_head(2)),
            )),
    decoder("opt", "OPT", "OPT", dropouts=("dropout",),
            sizes={k: v for k, v in SIZES.items() if k != "intermediate_size"},
            ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH, shapes=repeated(HEADS, HEADS, causal=True),
            heads=Heads(
                attention="model.decoder.layers.{}.self_attn", ffn="model.decoder.layers.{}.fc1",
                owner="model.decoder.layers.{}", replace=separate("k_proj", "v_proj"),
            ),
            no_ffn_slots="the FFN reads (14, 32), but the attention (2, 7, 32)"),
)  # fmt: skip
