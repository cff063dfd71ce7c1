"""What people write with torch.nn alone: its own modules, and nanoGPT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.families.row import (
    HEADS,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Family,
    Padding,
    padding_mask,
    repeated,
    token_ids,
)
from tests.models.families.slots import Heads, fused

KEY_ROWS, VALUE_ROWS = list(range(WIDTH, 2 * WIDTH)), list(range(2 * WIDTH, 3 * WIDTH))
FULL = repeated(HEADS, HEADS, causal=False)
CAUSAL = repeated(HEADS, HEADS, causal=True)

# --- a GPT as nanoGPT writes it -----------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Fused qkv; with ``flash`` through SDPA, without by hand and with a triangle in a buffer."""

    bias: Tensor

    def __init__(self, width: int, heads: int, flash: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.flash, self.dropout = heads, flash, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        k = k.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        q = q.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        if self.flash:
            dropout = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            y = self.attn_dropout(att) @ v
        y = y.transpose(1, 2).contiguous().view(batch, length, width)
        return self.resid_dropout(self.c_proj(y))


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
    def __init__(self, width: int, heads: int, flash: bool, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, flash, dropout)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Learned positions, tied head; the loss where targets are given."""

    def __init__(
        self, *, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS, flash: bool = True,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.wpe = nn.Embedding(64, width)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList([Block(width, heads, flash, dropout) for _ in range(layers)])
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


def nano(implementation: str, training: bool) -> nn.Module:
    return NanoGPT(flash=implementation == "flash", dropout=0.0 if training else 0.1)


def nano_inputs(padding: Padding) -> dict[str, Any]:
    ids = token_ids()
    return {"idx": ids, "targets": ids.roll(-1, 1)}


# --- torch.nn's own -----------------------------------------------------------------------------


class PaddedEncoder(nn.Module):
    """An embedding in front of nn.TransformerEncoder, and its ways to mask."""

    def __init__(self, *, batch_first: bool, causal: bool, dropout: float) -> None:
        super().__init__()
        self.batch_first, self.causal = batch_first, causal
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=dropout, batch_first=batch_first, norm_first=causal
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, ids: Tensor, padded: Tensor | None = None) -> Tensor:
        """`ids [B, T]`, `padded [B, T]` True at padding -> `[B, T, D]`."""
        x = self.embedding(ids)
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask=mask, src_key_padding_mask=padded, is_causal=self.causal)
        return x if self.batch_first else x.transpose(0, 1)


def transformer_encoder(*, causal: bool) -> Callable[[str, bool], nn.Module]:
    """Norms in front of the branches if causal, else behind the sums."""
    return lambda implementation, training: PaddedEncoder(
        batch_first=implementation == "batch first", causal=causal,
        dropout=0.0 if training else 0.1,
    )  # fmt: skip


def padded_ids(padding: Padding) -> dict[str, Any]:
    if padding == "none":
        return {"ids": token_ids()}
    return {"ids": token_ids(), "padded": padding_mask(padding) == 0}


class AttentionBlocks(nn.Module):
    """nn.MultiheadAttention between one's own norms and MLPs."""

    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.batch_first, self.need_weights = batch_first, need_weights
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first) for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.GELU(),
                          nn.Linear(HIDDEN, WIDTH))
            for _ in range(LAYERS)
        )  # fmt: skip

    def forward(self, ids: Tensor, padded: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            y = norm(x)
            x = x + attention(y, y, y, key_padding_mask=padded, need_weights=self.need_weights)[0]
            x = x + mlp(x)
        return x if self.batch_first else x.transpose(0, 1)


def attention_blocks(implementation: str, training: bool) -> nn.Module:
    order, _, weights = implementation.partition(", ")
    return AttentionBlocks(
        batch_first=order == "batch first", need_weights=weights == "need_weights"
    )


PACKED = fused("", KEY_ROWS, VALUE_ROWS, weight="in_proj_weight")

TORCH_NN = (
    Family(
        name="nanogpt", title="GPT as nanoGPT writes it", library="torch", make=nano,
        inputs=nano_inputs, implementations=("by hand", "flash"), oracle="flash", drops=True,
        shapes=CAUSAL,  # of flash; by hand it is a mask from a buffer, which nothing proves causal
        heads=Heads(attention="h.{}.attn", ffn="h.{}.mlp",
                    replace=fused("c_attn", KEY_ROWS, VALUE_ROWS)),
    ),
    Family(
        name="transformer_encoder", title="nn.TransformerEncoder, post-norm", library="torch",
        make=transformer_encoder(causal=False), inputs=padded_ids, padded=True, shapes=FULL,
        implementations=("batch first", "time first"), drops=True,
        heads=Heads(attention="encoder.layers.{}.self_attn", ffn="encoder.layers.{}.linear1",
                    owner="encoder.layers.{}", replace=PACKED),
    ),
    Family(
        name="causal_encoder", title="nn.TransformerEncoder, pre-norm and causal", library="torch",
        make=transformer_encoder(causal=True), inputs=padded_ids, shapes=CAUSAL,
        implementations=("batch first", "time first"), drops=True,
    ),
    Family(
        name="multihead_attention", title="nn.MultiheadAttention", library="torch",
        make=attention_blocks, inputs=padded_ids,
        implementations=("batch first", "batch first, need_weights", "time first"),
        padded=True, shapes=FULL,
        heads=Heads(attention="attentions.{}", ffn="mlps.{}.1", owner="mlps.{}", replace=PACKED),
    ),
)  # fmt: skip
