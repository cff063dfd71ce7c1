"""Families that are not converted: what is missing, and what their owner is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.models.families.beyond import BERT, GQA, MOE, long_text, pictures
from tests.models.families.row import (
    HEAD_DIM,
    VOCABULARY,
    WIDTH,
    WINDOW,
    Padding,
    language,
    transformers_model,
)

NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True, kw_only=True)
class RefusedFamily:
    """One family that `convert` refuses.

    Attributes:
        name, title, library, make, inputs: as in `Family`.
        implementation: how its attention is written.
        says: what the refusal's reason has to hold.
        fix: what its way out has to hold.
    """

    name: str
    title: str
    make: Callable[[str, bool], nn.Module]
    says: str
    fix: str
    inputs: Callable[[Padding], dict[str, Any]] = language
    implementation: str = "eager"
    library: str = "transformers"


REFUSED = (
    RefusedFamily(
        name="gpt_oss", title="GPT-OSS (attention sinks)", says="attention sinks",
        fix="strict=False",
        make=transformers_model("GptOssForCausalLM", "GptOssConfig", **GQA, **MOE,
                                head_dim=HEAD_DIM, sliding_window=WINDOW),
    ),
    RefusedFamily(
        name="gemma2", title="Gemma 2 (soft-capped scores)", says="softcapping",
        fix="strict=False",
        make=transformers_model("Gemma2ForCausalLM", "Gemma2Config", **GQA, head_dim=HEAD_DIM,
                                sliding_window=WINDOW),
    ),
    RefusedFamily(
        name="swin", title="Swin (shifted windows)", inputs=pictures,
        says="tokens are rearranged between the attention before and this one",
        fix="leave such a model as it is",
        make=transformers_model("SwinForImageClassification", "SwinConfig", image_size=32,
                                patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
                                window_size=4, drop_path_rate=0.0),
    ),
    RefusedFamily(
        name="longformer", title="Longformer (sliding chunks)", inputs=long_text,
        says="depends on the values of a tensor", fix="take the branch out",
        make=transformers_model("LongformerForMaskedLM", "LongformerConfig", **BERT, **NO_DROPOUT,
                                attention_window=4),
    ),
    RefusedFamily(
        name="big_bird", title="BigBird (block sparse)", inputs=long_text,
        says="its output is reshaped in place", fix="strict=False",
        make=transformers_model("BigBirdForMaskedLM", "BigBirdConfig", **BERT, **NO_DROPOUT,
                                block_size=1, num_random_blocks=1),
    ),
    RefusedFamily(
        name="mamba", title="Mamba (no attention)", says="no attention was found", fix="explain",
        make=transformers_model("MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY,
                                hidden_size=WIDTH, num_hidden_layers=2, state_size=4),
    ),
)  # fmt: skip
