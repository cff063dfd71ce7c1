"""Generation with a converted model is its own full forward pass, token for token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import moda_compile  # noqa: E402
from moda_compile import MoDAConfig  # noqa: E402
from tests.models.families.row import VOCABULARY, Case, build  # noqa: E402
from tests.models.families.table import FAMILIES  # noqa: E402

PROMPT, NEW = 6, 256
# float32 and logits of size 4: another order of summation over at most 300 keys.
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def model_of(name: str, implementation: str = "sdpa") -> Any:
    case = Case(implementation=implementation, training=False)
    model: Any = build(FAMILIES[name], case)
    for module in model.modules():  # so that 256 more tokens have a position
        if isinstance(module, nn.Embedding) and module.num_embeddings == 64:
            module.weight = nn.Parameter(torch.randn(512, module.embedding_dim) * 0.2)
    model.generation_config.pad_token_id = 0
    return model


def converted(name: str, ffn_kv: Any = "none", implementation: str = "sdpa", **options: Any) -> Any:
    torch._dynamo.reset()
    return moda_compile.convert(
        model_of(name, implementation),
        MoDAConfig(ffn_kv=ffn_kv),
        example_inputs={"input_ids": prompt()[0], "use_cache": False},
        backend="eager",
        **options,
    )


def prompt(batch: int = 2, length: int = PROMPT) -> tuple[Tensor, Tensor]:
    """Token ids, and an attention mask that pads the first row on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def whole(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of one pass without a cache; positions count from the first token but padding."""
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found: Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    return found


def generated(model: Any, ids: Tensor, mask: Tensor, new: int = NEW, **options: Any) -> Any:
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "implementation", "ffn_kv", "cache"),
    [
        ("llama", "sdpa", "shared", "dynamic"),
        ("llama", "eager", "none", "static"),
        ("qwen3", "sdpa", "none", "dynamic"),
        ("qwen3", "sdpa", "shared", "static"),
        ("olmo2", "eager", "none", "dynamic"),
        ("olmo2", "sdpa", "none", "static"),
        ("gpt2", "eager", "shared", "dynamic"),
        ("gpt2", "sdpa", "none", "static"),
    ],
)
def test_greedy(name: str, implementation: str, ffn_kv: str, cache: str) -> None:
    """256 new tokens behind left padding: the logits of every step, and each token."""
    model, (ids, mask) = converted(name, ffn_kv, implementation), prompt()
    found = generated(model, ids, mask, do_sample=False, cache_implementation=cache)
    expected = whole(model, found.sequences, mask)[:, PROMPT - 1 : -1]
    logits = torch.stack(found.logits, dim=1)
    torch.testing.assert_close(logits, expected, **CLOSE)
    # Where two tokens are as likely but for rounding, either is right.
    top = expected.topk(2, dim=-1).values
    sure = top[..., 0] - top[..., 1] > 2 * CLOSE["atol"]
    assert sure.float().mean() > 0.99
    assert torch.equal(expected.argmax(-1)[sure], found.sequences[:, PROMPT:][sure])
    plain = generated(model_of(name, implementation), ids, mask, new=8, do_sample=False)
    assert (torch.stack(plain.logits, dim=1) - logits[:, :8]).abs().max() > 0.1


def test_sampling() -> None:
    """With one seed, what one draws from the full pass's own distribution."""
    model, (ids, mask) = converted("llama"), prompt()
    torch.manual_seed(5)
    found = generated(model, ids, mask, new=16, do_sample=True, top_k=0).sequences
    torch.manual_seed(5)
    for _ in range(16):
        last = whole(model, ids, mask)[:, -1]
        ids = torch.cat([ids, torch.multinomial(last.softmax(-1), 1)], dim=1)
    assert torch.equal(found, ids)


def test_a_growing_cache_compiles_twice_for_all_lengths() -> None:
    """The prompt, the first new token, and then one graph for every further one."""
    model, (ids, mask) = converted("llama"), prompt()
    torch._dynamo.utils.counters.clear()
    generated(model, ids, mask, new=100, do_sample=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    static = converted("llama")
    torch._dynamo.utils.counters.clear()
    generated(static, ids, mask, new=100, do_sample=False, cache_implementation="static")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def new_cache(model: Any, kind: str) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=40)


def steps(model: Any, ids: Tensor, cache: Any, sizes: list[int], start: int = 0) -> Tensor:
    """Logits of ``ids`` in pieces of ``sizes``, all through one cache."""
    logits, at = [], 0
    with torch.no_grad():
        for size in sizes:
            piece = ids[:, at : at + size]
            positions = torch.arange(start + at, start + at + size)[None]
            made = model(
                input_ids=piece, past_key_values=cache, position_ids=positions, use_cache=True
            )
            logits.append(made.logits)
            at += size
    assert at == ids.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("name", "sizes", "kind"),
    [
        ("llama", [20], "static"),
        ("llama", [7, 7, 6], "dynamic"),
        ("gpt2", [1, 1, 17, 1], "static"),
        ("gemma3", [2, 6, 1, 1, 10], "dynamic"),
        ("gemma3", [9, 11], "static"),
    ],
    ids=str,
)
def test_prefill_in_chunks(name: str, sizes: list[int], kind: str) -> None:
    """Several queries over older keys: any way to cut the prompt gives one pass's logits."""
    model = converted(name, "shared" if name == "llama" else "none")
    ids, _ = prompt(length=20)
    expected = whole(model, ids, torch.ones_like(ids))
    found = steps(model, ids, new_cache(model, kind), sizes)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_cache_holds_what_a_plain_model_caches() -> None:
    """No depth KV in it, tensors as ever: it moves between converted and plain code."""
    model, plain, (ids, _) = converted("llama"), model_of("llama"), prompt()
    caches = [new_cache(m, "dynamic") for m in (model, plain)]
    for m, cache in zip((model, plain), caches, strict=True):
        steps(m, ids, cache, [PROMPT])
    assert len(caches[0].layers) == len(caches[1].layers) == 3
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    torch.testing.assert_close(caches[0].layers[0].keys, caches[1].layers[0].keys)
    # Swapped: each model goes on with the other's, as it would with its own of these contents.
    more = ids[:, :2]
    twin = copy.deepcopy(caches[0])
    expected = steps(plain, more, twin, [2], start=PROMPT)
    reverted = moda_compile.revert(model)
    torch.testing.assert_close(steps(reverted, more, caches[0], [2], start=PROMPT), expected)
    torch._dynamo.reset()
    again = moda_compile.convert(
        reverted, example_inputs={"input_ids": ids, "use_cache": False}, backend="eager"
    )
    found = steps(again, more, caches[1], [2], start=PROMPT)
    assert found.isfinite().all() and (found - expected).abs().max() > 0.1


def test_packed_sequences_are_those_run_one_by_one() -> None:
    """Two sequences in one row, told apart by positions that start anew: neither sees the other."""
    model, (ids, _) = converted("llama"), prompt(length=15)
    lengths = [4, 11]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for part, found in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        torch.testing.assert_close(found, whole(model, part, torch.ones_like(part)), **CLOSE)


def test_a_cropped_cache_goes_on_as_if_it_had_never_been_longer() -> None:
    model, (ids, _) = converted("llama"), prompt(length=12)
    cache = new_cache(model, "dynamic")
    steps(model, ids, cache, [12])
    cache.crop(-5)
    other = torch.cat([ids[:, :7], ids[:, :5].flip(1)], dim=1)
    found = steps(model, other[:, 7:], cache, [1, 4], start=7)
    expected = whole(model, other, torch.ones_like(other))
    torch.testing.assert_close(found, expected[:, 7:], **CLOSE)


def test_beam_search() -> None:
    """Beams reorder the cache's rows: the score of the best is its tokens' log-probability."""
    model, (ids, mask) = converted("llama"), prompt()
    found = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=3, do_sample=False, max_new_tokens=12,
        min_new_tokens=12, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    logits = whole(model, found.sequences, mask)[:, PROMPT - 1 : -1].log_softmax(-1)
    own = logits.gather(-1, found.sequences[:, PROMPT:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, own, rtol=0.0, atol=1e-3)


def test_speculative_decoding() -> None:
    """An assistant's guesses, checked several at a time, change none of the tokens."""
    model, (ids, _) = converted("llama"), prompt(batch=1)
    mask = torch.ones_like(ids)
    alone = generated(model, ids, mask, new=24, do_sample=False).sequences
    assistant = model_of("llama")  # the plain model: its guesses are often wrong
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False,
        assistant_model=assistant,
    )  # fmt: skip
    assert torch.equal(found, alone)


@pytest.mark.slow
def test_the_same_logits_through_inductor() -> None:
    torch._dynamo.reset()
    ids, mask = prompt()
    model = moda_compile.convert(
        model_of("llama"), example_inputs={"input_ids": ids, "use_cache": False}
    )
    found = generated(model, ids, mask, new=6, do_sample=False, cache_implementation="static")
    expected = whole(model, found.sequences, mask)[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, **CLOSE)
