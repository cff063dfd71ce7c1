"""What a row of the table of families says, and the sizes and batches that all rows share."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.models.families.slots import Heads

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("transformers").setLevel(logging.ERROR)

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 8
WIDTH, HIDDEN, VOCABULARY, BATCH, LENGTH = HEADS * HEAD_DIM, 40, 37, 2, 7
WINDOW = 4  # shorter than LENGTH, so that a window differs from a triangle

Padding = Literal["none", "padded"]
FFNKV = Literal["none", "shared", "projected"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of one library.

    Attributes:
        name: unique key.
        title: what the table calls it.
        library: distribution whose version is recorded.
        make: `(implementation, training) -> model`; with dropout 0 where it is to be trained.
        inputs: `padding -> keyword arguments` of one forward pass.
        implementations: how the attention is written.
        oracle: the implementation that the oracle runs in float64; it has to call
            `F.scaled_dot_product_attention`. By default the first of `implementations`.
        stacks: which stack each of the oracle's attention calls belongs to; see `ReferenceMode`.
        padded: whether a batch may be padded.
        drops: whether it has dropout inside its attention by default, and so in evaluation here.
        heads: where FFN slots come from, or None to try `ffn_kv="none"` only.
        no_ffn_slots: words of the refusal where the FFNs can't write slots; empty where they can.
        shapes: what `explain` says of each attention: (Hq, Hk, d, causal); None if not compared.
    """

    name: str
    title: str
    library: str
    make: Callable[[str, bool], nn.Module]
    inputs: Callable[[Padding], dict[str, Any]]
    implementations: tuple[str, ...] = ("sdpa", "eager")
    oracle: str = ""
    stacks: tuple[int | None, ...] = (0,) * LAYERS
    padded: bool = False
    drops: bool = False
    heads: Heads | None = None
    no_ffn_slots: str = ""
    shapes: tuple[tuple[int, int, int, bool], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to run a family."""

    implementation: str
    training: bool
    padding: Padding = "none"
    ffn_kv: FFNKV = "none"

    def __str__(self) -> str:
        """Words joined by dashes, as test ids are."""
        mode = "train" if self.training else "eval"
        return f"{self.implementation}-{mode}-{self.padding}-{self.ffn_kv}"


def cases(family: Family) -> list[Case]:
    """What is tried of a family: training, evaluation, every way to write it, padding and slots."""
    slots = family.heads is not None and not family.no_ffn_slots
    padding: Padding = "padded" if family.padded else "none"
    found = []
    for n, implementation in enumerate(family.implementations):
        trained = Case(implementation=implementation, training=True)
        evaluated = replace(trained, training=False)
        if n == 0:
            found.append(replace(trained, ffn_kv="projected" if slots else "none"))
            found.append(replace(evaluated, padding=padding, ffn_kv="shared" if slots else "none"))
        else:
            found.append(replace(trained, padding=padding))
            if family.drops:
                found.append(evaluated)
    return found


def parameters(families: Iterable[Family]) -> list[Any]:
    """For `pytest.mark.parametrize(("family", "case"), ...)`; skipped without the library."""
    found = []
    for family in families:
        there = importlib.util.find_spec(family.library) is not None
        marks = [] if there else [pytest.mark.skip(reason=f"needs {family.library}")]
        for case in cases(family):
            found.append(pytest.param(family, case, id=f"{family.name}-{case}", marks=marks))
    return found


def build(family: Family, case: Case, *, implementation: str | None = None) -> nn.Module:
    """The model with weights lively enough that norms, biases and attention matter.

    The same family gives the same weights for every case.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.make(implementation or case.implementation, case.training)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 2:
                    parameter.copy_(noise * (1.2 / math.sqrt(WIDTH)))
                else:
                    parameter.add_(0.2 * noise)
    return model.train(case.training)


def token_ids(length: int = LENGTH) -> Tensor:
    """`[B, T]`; the ids 0 to 4 are left to be padding and other special tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, VOCABULARY, (BATCH, length), generator=generator)


def padding_mask(padding: Padding, length: int = LENGTH) -> Tensor:
    """`[B, T]`, 1 where there is a token: one row is padded on the left, one on the right."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if padding == "padded":
        mask[0, :2] = 0
        mask[1, -3:] = 0
    return mask


def language(padding: Padding) -> dict[str, Any]:
    """A language model's batch, padded or (no attention_mask at all) not."""
    batch: dict[str, Any] = {"input_ids": token_ids(), "use_cache": False}
    if padding != "none":
        batch["attention_mask"] = padding_mask(padding)
    return batch


def encoder(padding: Padding) -> dict[str, Any]:
    """The same for models that know no cache."""
    batch = language(padding)
    del batch["use_cache"]
    return batch


def images(padding: Padding) -> dict[str, Any]:
    """`[B, 3, 12, 12]`: nine patches of 4 x 4."""
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(BATCH, 3, 12, 12, generator=generator)}


def shown(padding: Padding) -> Callable[[Any], Any]:
    """Which outputs count: all but those at padded positions.

    There a row may see no key at all, and what it yields differs from one way of writing a mask to
    another (zeros, or an average of everything). No real token ever reads it.
    """

    def keep(output: Any) -> Any:
        if padding == "none":
            return output
        logits = output if isinstance(output, Tensor) else first(output)
        mask = padding_mask(padding)[..., None].to(logits)
        # A decoder's targets have a length of their own, and no padding here.
        return logits * mask if logits.shape[1] == mask.shape[1] else logits

    return keep


def first(output: Any) -> Tensor:
    """The first floating tensor of a model's output."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    found: Tensor = next(
        x for x in output if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0
    )
    return found


def repeated(heads: int, kv_heads: int, *, causal: bool, layers: int = LAYERS) -> Any:
    """`Family.shapes` of a uniform stack."""
    return ((heads, kv_heads, HEAD_DIM, causal),) * layers


SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def transformers_model(
    model: str, config: str, *, dropouts: tuple[str, ...] = (), **options: Any
) -> Callable[[str, bool], nn.Module]:
    """`Family.make` for a class of transformers; `dropouts` are 0 in training, default in eval.

    An implementation is that of the attention, or "attention+experts".
    """

    def make(implementation: str, training: bool) -> nn.Module:
        import transformers

        zero = dict.fromkeys(dropouts, 0.0) if training else {}
        attention, _, experts = implementation.partition("+")
        chosen = {"attn_implementation": attention, "experts_implementation": experts or None}
        made = getattr(transformers, config)(**{**options, **zero, **chosen})
        built: nn.Module = getattr(transformers, model)(made)
        return built

    return make
