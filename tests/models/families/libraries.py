"""timm and litgpt."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tests.models.families.row import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    WINDOW,
    Family,
    Padding,
    repeated,
    token_ids,
)
from tests.models.families.slots import Heads, fused, separate


class _Word(type):
    """Attributes that are only passed around while modules are imported, such as enum members."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"stand-in for {cls.__name__}.{name}"


class _StandIn(ModuleType):
    """An empty package: every public name in it is an empty class of that name."""

    __path__: list[str] = []
    __file__ = __name__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Word(name, (), {})
        setattr(self, name, made)
        return made


NAMES = (
    "torchvision", "torchvision.datasets", "torchvision.models",
    "torchvision.models.feature_extraction", "torchvision.ops", "torchvision.ops.misc",
    "torchvision.transforms", "torchvision.transforms.functional",
)  # fmt: skip


@contextmanager
def _torchvision() -> Iterator[None]:
    """A stand-in while timm is imported, if there is no torchvision that works.

    timm imports torchvision for its data pipeline, and no model tested here calls any of it; but
    there is no CPU build of torchvision on PyPI, and a CUDA build next to a CPU PyTorch neither
    imports nor lets transformers import. Taken away again at once, so that nobody else sees it.
    """
    try:
        importlib.import_module("torchvision")
        yield
        return
    except (ImportError, RuntimeError):
        pass
    modules = {name: _StandIn(name) for name in NAMES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def timm() -> Any:
    """The module, imported."""
    if "timm" not in sys.modules:
        with _torchvision():
            importlib.import_module("timm")
    return sys.modules["timm"]


def pictures(padding: Padding) -> dict[str, Any]:
    """`[B, 3, 42, 42]`: nine patches of 14 x 14."""
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(BATCH, 3, 42, 42, generator=generator)}


def timm_model(name: str, **options: Any) -> Callable[[str, bool], nn.Module]:
    """`Family.make` for a registered model of timm, made small."""

    def make(implementation: str, training: bool) -> nn.Module:
        library = timm()
        layers = sys.modules["timm.layers"]
        before = layers.use_fused_attn()
        layers.set_fused_attn(implementation == "fused")
        try:
            model: nn.Module = library.create_model(
                name, img_size=42, patch_size=14, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS,
                num_classes=5, **options,
            )  # fmt: skip
        finally:
            layers.set_fused_attn(before)
        return model

    return make


def litgpt_model(**options: Any) -> Callable[[str, bool], nn.Module]:
    """`Family.make` for litgpt's GPT."""

    def make(implementation: str, training: bool) -> nn.Module:
        from litgpt import GPT, Config

        model: nn.Module = GPT(
            Config(
                block_size=64,
                padded_vocab_size=VOCABULARY,
                n_layer=LAYERS,
                n_head=HEADS,
                n_embd=WIDTH,
                intermediate_size=HIDDEN,
                **options,
            )  # fmt: skip
        )
        return model

    return make


def tokens_only(padding: Padding) -> dict[str, Any]:
    return {"idx": token_ids()}


def _rows(part: int, width: int = WIDTH) -> list[int]:
    return list(range(part, part + width))


FULL = repeated(HEADS, HEADS, causal=False)
KV_WIDTH = KV_HEADS * HEAD_DIM
PACKED = fused("qkv", _rows(WIDTH), _rows(2 * WIDTH))


def timm_row(
    name: str, title: str, model: str, heads: Heads, *, no_ffn_slots: str = "", **options: Any
) -> Family:
    return Family(
        name=name, title=title, library="timm", make=timm_model(model, **options),
        inputs=pictures, implementations=("fused", "unfused"), heads=heads, shapes=FULL,
        no_ffn_slots=no_ffn_slots,
    )  # fmt: skip


LIBRARIES = (
    timm_row("timm_vit", "ViT", "vit_tiny_patch16_224",
             Heads(attention="blocks.{}.attn", ffn="blocks.{}.mlp", replace=PACKED), mlp_ratio=2),
    timm_row("timm_dinov2", "DINOv2 (registers, layer scale)", "vit_small_patch14_reg4_dinov2",
             Heads(attention="blocks.{}.attn", ffn="blocks.{}.mlp", replace=PACKED), mlp_ratio=2),
    timm_row("timm_eva02_tiny", "EVA-02 tiny (rotary, fused projections)", "eva02_tiny_patch14_224",
             Heads(attention="blocks.{}.attn", ffn="blocks.{}.mlp",
                   replace=PACKED),
             no_ffn_slots="keys or values are cut out of their projection is not understood"),
    timm_row("timm_eva02_base", "EVA-02 base (rotary, inner norms)", "eva02_base_patch14_224",
             Heads(attention="blocks.{}.attn", ffn="blocks.{}.mlp",
                   replace=separate("k_proj", "v_proj")),
             no_ffn_slots="0 feed-forward networks between its attention and the next"),
    Family(
        name="litgpt_llama", title="GPT, as Llama", library="litgpt",
        make=litgpt_model(
            n_query_groups=KV_HEADS, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
            parallel_residual=False, bias=False, rotary_percentage=1.0,
        ),
        inputs=tokens_only, implementations=("sdpa",),
        shapes=repeated(HEADS, KV_HEADS, causal=True),
        heads=Heads(attention="transformer.h.{}.attn", ffn="transformer.h.{}.mlp",
                    replace=fused("qkv", _rows(WIDTH, KV_WIDTH),
                                  _rows(WIDTH + KV_WIDTH, KV_WIDTH))),
    ),
    Family(
        name="litgpt_pythia", title="GPT, as Pythia (parallel blocks)", library="litgpt",
        make=litgpt_model(rotary_percentage=0.5, parallel_residual=True),
        inputs=tokens_only, implementations=("sdpa",), shapes=repeated(HEADS, HEADS, causal=True),
        heads=Heads(attention="transformer.h.{}.attn", ffn="transformer.h.{}.mlp", replace=PACKED),
    ),
    Family(
        name="litgpt_gemma3", title="GPT, as Gemma 3 (sliding windows)", library="litgpt",
        make=litgpt_model(
            n_query_groups=KV_HEADS, norm_class_name="RMSNorm", mlp_class_name="GemmaMLP",
            parallel_residual=False, bias=False, rotary_percentage=1.0, norm_qk=True,
            sliding_window_size=WINDOW, sliding_window_indices=[1, 0, 1],
            gelu_approximate="tanh", post_attention_norm=True, post_mlp_norm=True,
        ),
        inputs=tokens_only, implementations=("sdpa",),
        shapes=tuple((HEADS, KV_HEADS, HEAD_DIM, causal) for causal in (False, True, False)),
        heads=Heads(attention="transformer.h.{}.attn", ffn="transformer.h.{}.mlp",
                    replace=fused("qkv", _rows(WIDTH, KV_WIDTH),
                                  _rows(WIDTH + KV_WIDTH, KV_WIDTH))),
    ),
)  # fmt: skip
