"""Converted models through state_dicts, copies and save_pretrained. See also test_loading.py."""

from __future__ import annotations

import copy
import functools
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda_compile
from moda_compile import InputError, MoDAConfig, RewriteError
from moda_compile.markers import Saved
from tests.models.cases import IDS, PROJECTED, convert, stack, traces

KEY = "moda_config"
MODES = ("none", "shared", "projected")
CONFIGS = [*(MoDAConfig(ffn_kv=mode) for mode in MODES), MoDAConfig(depth=False)]
BY_CONFIG = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: c.ffn_kv if c.depth else "depth off"
)


def load(model: nn.Module, checkpoint: Any, **options: Any) -> Any:
    options = {"example_inputs": (IDS,), "backend": "eager"} | options
    return moda_compile.load(model, checkpoint, **options)


@functools.cache  # most of a test's time goes into conversions and first calls
def _saved(config: MoDAConfig, seed: int) -> tuple[nn.Module, dict[str, Any], Tensor]:
    model = convert(stack(seed=seed), config)
    return model, model.state_dict(), model(IDS).detach()


def saved(config: MoDAConfig, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """The state_dict of a converted model, and what that model computes."""
    _, state, logits = _saved(config, seed)
    return {name: value.clone() for name, value in state.items()}, logits


def standing(config: MoDAConfig) -> nn.Module:
    """A converted model that all tests share: for what leaves it as it is."""
    return _saved(config, 0)[0]


def text_of(entry: Tensor) -> Any:
    return json.loads(bytes(entry.tolist()))


class Same:
    """Requires on leaving that ``model`` is as it was on entering."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.traces, self.state = traces(model), copy.deepcopy(model.state_dict())

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        state = self.model.state_dict()
        assert traces(self.model) == self.traces
        assert list(state) == list(self.state)
        assert all(torch.equal(value, self.state[name]) for name, value in state.items())


# --- what a state_dict says ---------------------------------------------------------------------


@BY_CONFIG
def test_the_entry(config: MoDAConfig) -> None:
    state, _ = saved(config)
    assert list(state)[-1] == KEY
    assert text_of(state[KEY]) == {
        "format": 1,
        "strict": True,
        "config": {
            "ffn_kv": config.ffn_kv,
            "depth": config.depth,
            "accumulator_dtype": "float32",
        },
    }
    assert moda_compile.saved_config(state) == config
    assert moda_compile.saved_config(stack().state_dict()) is None


def test_strict_counts() -> None:
    state = moda_compile.convert(stack(), None, (IDS,), "eager", strict=False).state_dict()
    assert text_of(state[KEY])["strict"] is False
    model = load(stack(seed=5), state)
    assert torch.equal(model.state_dict()[KEY], state[KEY])
    with pytest.raises(InputError, match="strict=False.*strict=True"):
        convert(stack()).load_state_dict(state)


def test_a_model_that_was_not_looked_at_yet() -> None:
    model = moda_compile.convert(stack(), backend="eager")
    held = model.state_dict()
    logits = model(IDS)
    assert torch.equal(held[KEY], model.state_dict()[KEY])
    assert torch.equal(load(stack(seed=5), held, example_inputs=None)(IDS), logits)


def test_revert_takes_it_away() -> None:
    plain, model = stack(), stack()
    with Same(model):
        for config in CONFIGS:
            moda_compile.revert(convert(model, config))
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{KEY}"'):
        model.load_state_dict(saved(MoDAConfig())[0])
    model.load_state_dict(plain.state_dict())


def test_a_failed_conversion_leaves_none() -> None:
    for model, error in ((nn.Linear(9, 9), RewriteError), (stack(), InputError)):
        if error is InputError:
            model.moda_config = 3
        with Same(model), pytest.raises(error):
            moda_compile.convert(model, None, (torch.zeros(2, 9),), "eager")


def test_copies_have_it_too() -> None:
    model = standing(PROJECTED)
    state, logits = saved(PROJECTED)
    other, _ = saved(MoDAConfig())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(twin.state_dict()[KEY], state[KEY])
        assert torch.equal(twin(IDS), logits)
        twin.load_state_dict({n: t if n == KEY else 2 * t for n, t in state.items()})
        assert not torch.equal(twin(IDS), logits)
        with pytest.raises(InputError, match="converted with"):
            twin.load_state_dict(other)
        moda_compile.revert(twin)
        assert KEY not in twin.state_dict() and not hasattr(twin, KEY)
    with Same(model):
        assert torch.equal(model(IDS), logits)


def test_functional_call() -> None:
    """All of a state_dict may stand in for the parameters."""
    model = standing(PROJECTED)
    state, logits = saved(PROJECTED, seed=5)
    with Same(model):
        assert torch.equal(torch.func.functional_call(model, state, (IDS,)), logits)
        assert not torch.equal(model(IDS), logits)


# --- load_state_dict ----------------------------------------------------------------------------


OPTIONS: list[dict[str, bool]] = [{"strict": False}, {"assign": True}, {}]


@BY_CONFIG
def test_load_state_dict(config: MoDAConfig) -> None:
    model = convert(stack(seed=5), config)
    for options in OPTIONS:
        state, logits = saved(config)
        names = list(state)
        result = model.load_state_dict(state, **options)
        assert not result.missing_keys and not result.unexpected_keys
        assert list(state) == names  # the caller's own still has the entry
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(IDS), logits)


@pytest.mark.parametrize("one", CONFIGS[:3], ids=lambda c: c.ffn_kv)
def test_another_conversion(one: MoDAConfig) -> None:
    state, model = saved(one)[0], standing(one)
    for other in (*CONFIGS, MoDAConfig(accumulator_dtype="model")):
        entry = Saved(config=other, strict=True).to_tensor()
        for options in OPTIONS if other != one else []:
            with Same(model), pytest.raises(InputError) as caught:
                model.load_state_dict(
                    {n: 2 * t for n, t in state.items()} | {KEY: entry}, **options
                )
            assert all(str(x) in str(caught.value) for x in (one, other, KEY))


@pytest.mark.parametrize("mode", ["none", "shared"])
def test_plain_weights(mode: Any) -> None:
    model = convert(stack(), MoDAConfig(ffn_kv=mode))
    model.load_state_dict(stack(seed=5).state_dict())
    assert torch.equal(model(IDS), saved(MoDAConfig(ffn_kv=mode), seed=5)[1])


def test_plain_weights_leave_no_projection_random() -> None:
    model = standing(PROJECTED)
    for options in OPTIONS:
        with Same(model), pytest.raises(InputError, match="plain model's.*stay random") as caught:
            model.load_state_dict(stack(seed=5).state_dict(), **options)
        for word in (KEY, "moda_key_weight", "load them first and convert the model afterwards"):
            assert word in str(caught.value)


def test_parts_of_a_state_dict() -> None:
    """strict=False loads an adapter, say; all weights without the entry are what they are."""
    model = convert(stack(), PROJECTED)
    state, logits = saved(PROJECTED, seed=5)
    part = {"head.weight": state["head.weight"]}
    assert KEY not in model.load_state_dict(part, strict=False).missing_keys
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(part)
    del state[KEY]
    model.load_state_dict(state)
    assert torch.equal(model(IDS), logits)
    del state["blocks.0.ffn.moda_value_weight"]
    with pytest.raises(InputError, match="blocks.0.ffn"):
        model.load_state_dict(state)


@BY_CONFIG
def test_never_into_an_unconverted_model(config: MoDAConfig) -> None:
    state, _ = saved(config)
    model = stack()
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{KEY}"'):
        model.load_state_dict(state)
    assert KEY in model.load_state_dict(state, strict=False).unexpected_keys


def test_as_part_of_a_bigger_model() -> None:
    def bigger(seed: int) -> nn.ModuleDict:
        parts = {"plain": nn.Linear(2, 2), "moda": convert(stack(seed=seed), PROJECTED)}
        return nn.ModuleDict(parts)

    one, other = bigger(0), bigger(5)
    state = one.state_dict()
    assert [name for name in state if name.endswith(KEY)] == [f"moda.{KEY}"]
    other.load_state_dict(state)
    assert torch.equal(other["moda"](IDS), one["moda"](IDS))
    assert moda_compile.saved_config(state) is None
    assert moda_compile.saved_config(state, prefix="moda.") == PROJECTED

    state[f"moda.{KEY}"] = saved(MoDAConfig())[0][KEY]
    with Same(other["moda"]), pytest.raises(InputError, match=f"moda.{KEY}: .*ffn_kv='none'"):
        other.load_state_dict(state)
    del state[f"moda.{KEY}"], state["moda.blocks.0.ffn.moda_key_weight"]
    with Same(other["moda"]), pytest.raises(InputError, match="moda.blocks.0.ffn .*plain|plain"):
        other.load_state_dict(state)


def test_load_a_part() -> None:
    state, logits = saved(PROJECTED)
    whole = {f"module.{name}": value for name, value in state.items()} | {"else": torch.ones(1)}
    model = stack(seed=5)
    with Same(model), pytest.raises(InputError, match=f"'module.{KEY}'.*prefix="):
        load(model, whole)
    assert torch.equal(load(model, whole, prefix="module.")(IDS), logits)


# --- transformers -------------------------------------------------------------------------------


def llama(tied: bool, seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = dict(vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


BATCH = {"input_ids": IDS, "use_cache": False}


@pytest.mark.parametrize(
    ("mode", "tied", "shard"),
    [
        ("none", True, "20KB"),
        ("shared", False, "1GB"),
        ("projected", True, "1GB"),
        ("projected", False, "20KB"),
    ],
)
def test_save_pretrained(
    mode: Any, tied: bool, shard: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MoDAConfig(ffn_kv=mode)
    model = moda_compile.convert(llama(tied), config, BATCH, "eager")
    logits = model(**BATCH).logits
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")

    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)  # which does not propagate
    caplog.set_level(logging.WARNING, logger="transformers")  # as it is unless a test changed it
    try:
        plain, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    finally:
        log.removeHandler(caplog.handler)
    added = {name for name in model.state_dict() if name.rpartition(".")[2].startswith("moda_")}
    assert said["unexpected_keys"] == added and KEY in added
    assert any(KEY in record.getMessage() for record in caplog.records)
    assert torch.equal(plain(**BATCH).logits, llama(tied)(**BATCH).logits)

    assert moda_compile.saved_config(tmp_path) == config
    loaded = load(plain, tmp_path, example_inputs=BATCH)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(**BATCH).logits, logits)


def test_save_pretrained_bfloat16(tmp_path: Path) -> None:
    plain = llama(tied=True)
    plain.to(torch.bfloat16).save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path)  # whose rotary angles are in float32
    moda_compile.convert(model, PROJECTED, BATCH, "eager").save_pretrained(tmp_path)
    other = load(type(model).from_pretrained(tmp_path), tmp_path, example_inputs=BATCH).eval()
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert torch.equal(other(**BATCH).logits, model(**BATCH).logits)
