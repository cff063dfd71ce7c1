"""Encoders of transformers: text, images, sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models.families.row import (
    BATCH,
    HEADS,
    HIDDEN,
    LAYERS,
    SIZES,
    WIDTH,
    WINDOW,
    Family,
    Padding,
    encoder,
    images,
    repeated,
    transformers_model,
)
from tests.models.families.slots import Heads, fused, separate

FULL = repeated(HEADS, HEADS, causal=False)
BERT_SIZES: dict[str, Any] = {**SIZES, "type_vocab_size": 2, "pad_token_id": 1}
BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
IMAGE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "image_size": 12, "patch_size": 4,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN, "num_mel_bins": 6, "max_source_positions": 8,
}  # fmt: skip


def bert_heads(prefix: str) -> Heads:
    layer = f"{prefix}.encoder.layer.{{}}"
    return Heads(
        attention=f"{layer}.attention.self", ffn=f"{layer}.intermediate", owner=layer,
        replace=separate("key", "value"),
    )  # fmt: skip


def spectrogram(padding: Padding) -> dict[str, Any]:
    """`[B, mels, 2 * T]`: the encoder halves the length."""
    generator = torch.Generator().manual_seed(0)
    return {"input_features": torch.randn(BATCH, 6, 16, generator=generator)}


def whisper(implementation: str, training: bool) -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    options: dict[str, Any] = {**WHISPER, "attn_implementation": implementation}
    return WhisperEncoder(WhisperConfig(**options))


def text(name: str, title: str, model: str, config: str, heads: Heads, **options: Any) -> Family:
    return Family(
        name=name, title=title, library="transformers",
        make=transformers_model(model, config, **options), inputs=encoder, padded=True,
        heads=heads, shapes=FULL, drops="dropouts" in options,
    )  # fmt: skip


ENCODERS = (
    text("bert", "BERT", "BertForMaskedLM", "BertConfig", bert_heads("bert"),
         dropouts=BERT_DROPOUTS, **BERT_SIZES),
    text("roberta", "RoBERTa", "RobertaForMaskedLM", "RobertaConfig", bert_heads("roberta"),
         dropouts=BERT_DROPOUTS, **BERT_SIZES),
    text("modernbert", "ModernBERT (local and global layers)", "ModernBertForMaskedLM",
         "ModernBertConfig",
         Heads(attention="model.layers.{}.attn", ffn="model.layers.{}.mlp",
               replace=fused("Wqkv", list(range(WIDTH, 2 * WIDTH)),
                             list(range(2 * WIDTH, 3 * WIDTH)))),
         local_attention=WINDOW, cls_token_id=None, sep_token_id=None,
         layer_types=["full_attention", "sliding_attention", "full_attention"], **SIZES),
    Family(
        name="vit", title="ViT", library="transformers", inputs=images, shapes=FULL,
        make=transformers_model("ViTForImageClassification", "ViTConfig", **IMAGE,
                                intermediate_size=HIDDEN, num_labels=5),
        heads=Heads(attention="vit.layers.{}.attention", ffn="vit.layers.{}.mlp",
                    replace=separate("k_proj", "v_proj")),
    ),
    Family(
        name="dinov2", title="DINOv2", library="transformers", inputs=images, shapes=FULL,
        make=transformers_model("Dinov2ForImageClassification", "Dinov2Config", **IMAGE,
                                mlp_ratio=2, num_labels=5),
        heads=Heads(attention="dinov2.encoder.layer.{}.attention",
                    ffn="dinov2.encoder.layer.{}.mlp", replace=separate("k_proj", "v_proj")),
    ),
    Family(
        name="whisper", title="Whisper's encoder", library="transformers", inputs=spectrogram,
        make=whisper, shapes=FULL,
        heads=Heads(attention="layers.{}.self_attn", ffn="layers.{}.fc1", owner="layers.{}",
                    replace=separate("k_proj", "v_proj")),
    ),
)  # fmt: skip
