"""The oracle of the families: it is the same model but for depth, and its FFN slots are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import (  # noqa: E402
    apply_rotary_pos_emb,
)

from moda_compile.testing import FFNSlots, reference  # noqa: E402
from tests.models.families.row import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    WIDTH,
    Case,
    Family,
    Padding,
    build,
    first,
    shown,
)
from tests.models.families.slots import slots_factory  # noqa: E402
from tests.models.families.table import FAMILIES  # noqa: E402

# Logits are of order 1, and float32 rounds them by some 1e-6.
SAME = 1e-4
OTHER = 1e-2


def case_of(family: Family, padding: Padding = "none", ffn_kv: Any = "none") -> Case:
    return Case(
        implementation=family.oracle or family.implementations[0],
        training=False,
        padding=padding,
        ffn_kv=ffn_kv,
    )


@pytest.mark.parametrize("padding", ["none", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_to_write_it_is_the_oracles_model(name: str, padding: Padding) -> None:
    """Without depth, so that a difference under conversion is the conversion's."""
    family = FAMILIES[name]
    if padding == "padded" and not family.padded:
        pytest.skip("takes no padding")
    case, keep = case_of(family, padding), shown(padding)
    with torch.no_grad():
        expected = first(keep(build(family, case)(**family.inputs(padding))))
        for implementation in family.implementations:
            model = build(family, case, implementation=implementation)
            got = first(keep(model(**family.inputs(padding))))
            assert (got - expected).abs().max() < SAME, implementation
    assert expected.abs().max() > OTHER


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_is_another_model_with_depth(name: str) -> None:
    """Else the comparisons would say nothing about depth, or about FFN slots."""
    family = FAMILIES[name]
    model = build(family, case_of(family))
    inputs = family.inputs("none")
    with torch.no_grad():
        seen = [first(model(**inputs))]
        for kind in ("none", "shared") if family.heads is not None else ("none",):
            slots = None
            if kind != "none":
                assert family.heads is not None
                slots = slots_factory(family.heads, kind)(model, {})
            stacks = family.stacks
            moda = first(reference(model, **inputs, ffn_slots=slots, stacks=stacks))
            assert all((moda - other).abs().max() > OTHER for other in seen)
            seen.append(moda)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.padded])
def test_padding_matters_and_padded_tokens_do_not(name: str) -> None:
    family = FAMILIES[name]
    model = build(family, case_of(family))
    batch = family.inputs("padded")
    keep = shown("padded")
    with torch.no_grad():
        padded, plain = (keep(model(**b)) for b in (batch, family.inputs("none")))
        assert (first(padded) - first(plain)).abs().max() > OTHER
        ids = next(name for name, x in batch.items() if x is not None and x.dtype == torch.long)
        other = batch[ids].clone()
        other[0, :2], other[1, -3:] = 7, 9
        assert not torch.equal(other, batch[ids])
        assert (first(keep(model(**batch | {ids: other}))) - first(padded)).abs().max() < SAME


# --- FFN slots by hand --------------------------------------------------------------------------


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * d] -> [B, H, T, d]."""
    return x.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2)


def split(attention: Any, x: Tensor, new: Any) -> tuple[Tensor, Tensor]:
    """Features [B, T, Hk * d] of k and v, from the layer's own projections or from new weights."""
    if new is None:
        return attention.k_proj(x), attention.v_proj(x)
    return F.linear(x, new[0]), F.linear(x, new[1])


def rotate(model: Any, key: Tensor, x: Tensor) -> Tensor:
    cos, sin = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    return apply_rotary_pos_emb(key, key, cos, sin)[1]


def llama(model: Any, layer: int, x: Tensor, new: Any) -> tuple[Tensor, Tensor]:
    k, v = split(model.model.layers[layer].self_attn, x, new)
    return rotate(model, by_head(k, KV_HEADS), x), by_head(v, KV_HEADS)


def qwen3(model: Any, layer: int, x: Tensor, new: Any) -> tuple[Tensor, Tensor]:
    attention = model.model.layers[layer].self_attn
    k, v = split(attention, x, new)
    normed = attention.k_norm(k.unflatten(-1, (KV_HEADS, HEAD_DIM))).transpose(1, 2)
    return rotate(model, normed, x), by_head(v, KV_HEADS)


def olmo2(model: Any, layer: int, x: Tensor, new: Any) -> tuple[Tensor, Tensor]:
    attention = model.model.layers[layer].self_attn
    k, v = split(attention, x, new)
    return rotate(model, by_head(attention.k_norm(k), KV_HEADS), x), by_head(v, KV_HEADS)


def gpt2(model: Any, layer: int, x: Tensor, new: Any) -> tuple[Tensor, Tensor]:
    if new is None:  # GPT-2 keeps [in, out] weights
        fused = model.transformer.h[layer].attn.c_attn
        qkv = x @ fused.weight + fused.bias
        k, v = qkv[..., WIDTH : 2 * WIDTH], qkv[..., 2 * WIDTH :]
    else:
        k, v = F.linear(x, new[0]), F.linear(x, new[1])
    return by_head(k, HEADS), by_head(v, HEADS)


def nanogpt(model: Any, layer: int, x: Tensor, new: Any) -> tuple[Tensor, Tensor]:
    if new is None:
        fused = model.h[layer].attn.c_attn
        k = F.linear(x, fused.weight[WIDTH : 2 * WIDTH], fused.bias[WIDTH : 2 * WIDTH])
        v = F.linear(x, fused.weight[2 * WIDTH :], fused.bias[2 * WIDTH :])
    else:
        k, v = F.linear(x, new[0]), F.linear(x, new[1])
    return by_head(k, HEADS), by_head(v, HEADS)


def vit(model: Any, layer: int, x: Tensor, new: Any) -> tuple[Tensor, Tensor]:
    k, v = split(model.vit.layers[layer].attention, x, new)
    return by_head(k, HEADS), by_head(v, HEADS)


@pytest.mark.parametrize("kind", ["shared", "projected"])
@pytest.mark.parametrize("slot", [llama, qwen3, olmo2, gpt2, nanogpt, vit])
def test_ffn_slots_spelled_out(slot: Any, kind: str) -> None:
    """What the attention module yields is what the formulas say, for six kinds of projection."""
    family = FAMILIES[slot.__name__]
    assert family.heads is not None
    model = build(family, case_of(family)).double()
    inputs: dict[str, Any] = family.inputs("none")
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    kv_heads = family.shapes[0][1] if family.shapes is not None else HEADS
    new = {
        name: torch.randn(kv_heads * HEAD_DIM, WIDTH, dtype=torch.float64) * 0.2
        for layer in range(LAYERS - 1)
        for name in family.heads.new(layer)
    }

    def formula(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        names = family.heads.new(layer) if family.heads is not None else ()
        return slot(model, layer, x, [new[n] for n in names] if kind == "projected" else None)

    modules = [family.heads.ffn.format(layer) for layer in range(LAYERS - 1)]
    by_hand = FFNSlots(modules=modules, key_value=formula)
    with torch.no_grad():
        expected = first(reference(model, **inputs, ffn_slots=by_hand, stacks=family.stacks))
        slots = slots_factory(family.heads, kind)(model, new)
        got = first(reference(model, **inputs, ffn_slots=slots, stacks=family.stacks))
    # float64; transformers' rotary computes in float32 on both sides alike.
    assert (got - expected).abs().max() < 1e-12
