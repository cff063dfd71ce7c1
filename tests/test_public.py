"""Public names: words, types, tables, options and errors that survive a process boundary."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

import moda_compile
import moda_compile.testing
from moda_compile import (
    AttentionReport,
    Backend,
    InputError,
    MoDAConfig,
    MoDAError,
    NotRewrittenError,
    Report,
    RewriteError,
)
from moda_compile.report import spans, table

TESTING = sorted(moda_compile.testing.__all__)


# --- names (those of moda_compile itself: see test_layers.py) -------------------------------------


@pytest.mark.parametrize("name", TESTING)
def test_testing_name(name: str) -> None:
    thing = getattr(moda_compile.testing, name)
    if name == "FFNSlotsFactory":  # the name of a type has nowhere to hold a docstring
        assert thing.__args__[-1] is moda_compile.testing.FFNSlots
        return
    assert inspect.getdoc(thing)
    functions = [thing] if inspect.isfunction(thing) else []
    if inspect.isclass(thing):
        assert thing.__doc__, f"{name} only inherits its docstring"
        functions += [
            m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")
        ]
    for function in functions:
        assert inspect.getdoc(function), function
        signature = inspect.signature(function)
        assert signature.return_annotation is not signature.empty, function
        bare = [
            p.name
            for p in signature.parameters.values()
            if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare, (function, bare)


@pytest.mark.parametrize("module", [moda_compile, moda_compile.testing], ids=lambda m: m.__name__)
def test_all_is_sorted_and_complete(module: Any) -> None:
    assert list(module.__all__) == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


def test_signatures() -> None:
    """Names and defaults that users rely on."""
    convert = inspect.signature(moda_compile.convert).parameters
    assert {n: p.default for n, p in convert.items() if p.default is not p.empty} == {
        "config": None,
        "example_inputs": None,
        "backend": "inductor",
        "strict": True,
        "mode": None,
        "options": None,
        "dynamic": None,
    }
    load = inspect.signature(moda_compile.load).parameters
    assert list(load)[:4] == ["model", "checkpoint", "example_inputs", "backend"]
    assert {n: p.default for n, p in load.items() if p.default is not p.empty} == {
        "example_inputs": None,
        "backend": "inductor",
        "prefix": "",
        "mode": None,
        "options": None,
        "dynamic": None,
    }
    assert list(inspect.signature(moda_compile.saved_config).parameters) == ["checkpoint", "prefix"]
    attention = inspect.signature(moda_compile.moda_attention).parameters
    assert list(attention) == [
        "q", "k", "v", "depth_k", "depth_v", "is_causal", "attn_mask", "scale",
        "return_lse",
    ]  # fmt: skip
    assert [n for n, p in attention.items() if p.kind is p.KEYWORD_ONLY] == [
        "is_causal",
        "attn_mask",
        "scale",
        "return_lse",
    ]
    assert list(inspect.signature(moda_compile.revert).parameters) == ["model"]
    assert list(inspect.signature(moda_compile.register_pattern).parameters) == ["pattern"]
    explain = inspect.signature(moda_compile.explain).parameters
    assert [p.kind for p in explain.values()] == [
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    ]


# --- MoDAConfig ---------------------------------------------------------------------------------

CONFIGS = [
    MoDAConfig(),
    MoDAConfig(ffn_kv="projected"),
    MoDAConfig(ffn_kv="shared", depth=False),
    MoDAConfig(accumulator_dtype="model"),
]


def test_defaults() -> None:
    assert dataclasses.asdict(MoDAConfig()) == {
        "ffn_kv": "none",
        "depth": True,
        "accumulator_dtype": "float32",
    }


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_round_trips(config: MoDAConfig) -> None:
    assert MoDAConfig.from_json(config.to_json()) == config
    assert "\n" not in config.to_json()
    assert pickle.loads(pickle.dumps(config)) == config
    assert eval(repr(config)) == config
    assert hash(config) == hash(copy.deepcopy(config))


def test_config_is_frozen_and_keyword_only() -> None:
    config = MoDAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ffn_kv = "shared"  # type: ignore[misc]
    with pytest.raises(TypeError):
        MoDAConfig("shared")  # type: ignore[misc]
    assert len({*CONFIGS, MoDAConfig()}) == len(CONFIGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ffn_kv", "both"),
        ("ffn_kv", None),
        ("ffn_kv", True),
        ("depth", "yes"),
        ("depth", None),
        ("depth", 2),
        ("accumulator_dtype", "bfloat16"),
    ],
)
def test_config_refuses(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"MoDAConfig.{field}: got {value!r}, expected one of"):
        MoDAConfig(**{field: value})


@pytest.mark.parametrize("value", [["none"], {}, [True]], ids=str)
def test_config_refuses_what_has_no_hash(value: Any) -> None:
    with pytest.raises(InputError, match="ffn_kv"):
        MoDAConfig(ffn_kv=value)


@pytest.mark.parametrize("value", [1, 0, 1.0])
def test_a_number_is_no_truth_value(value: Any) -> None:
    """1 == True, but a configuration's JSON is part of a graph's identity."""
    with pytest.raises(InputError, match="depth"):
        MoDAConfig(depth=value)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"depth": true, "width": 3}'])
def test_bad_json_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="JSON"):
        MoDAConfig.from_json(text)


@pytest.mark.parametrize("compiler", ["Inductor", "", None])
def test_backend_refuses_unknown_compilers(compiler: Any) -> None:
    with pytest.raises(InputError, match=r"compiler: got .* expected one of \('inductor'"):
        Backend(compiler=compiler)


# --- errors -------------------------------------------------------------------------------------


def test_one_base() -> None:
    for error in (InputError, RewriteError, NotRewrittenError):
        assert issubclass(error, MoDAError)
    assert issubclass(MoDAError, RuntimeError)
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    "error", [MoDAError("a"), InputError("b"), NotRewrittenError("c")], ids=lambda e: str(e)
)
def test_plain_errors_pickle(error: MoDAError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.parametrize("block", ["layers.3.attn", None])
@pytest.mark.parametrize("source", ["model.py:12", None])
def test_rewrite_error(block: str | None, source: str | None) -> None:
    error = RewriteError("It is cross-attention.", fix="leave it out.", block=block, source=source)
    for one in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (one.reason, one.fix, one.block, one.source) == (
            "It is cross-attention.",
            "leave it out.",
            block,
            source,
        )
        place = (block or "model") + (f" ({source})" if source else "")
        assert str(one) == f"{place}: It is cross-attention. To fix: leave it out."


# --- reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((), "-"),
        ((0,), "0"),
        ((0, 1), "0-1"),
        ((0, 1, 2, 5), "0-2,5"),
        ((3, 5, 7), "3,5,7"),
        (range(100), "0-99"),
    ],
)
def test_spans(numbers: Any, text: str) -> None:
    assert spans(numbers) == text


def test_table() -> None:
    assert table([("a", "long"), ("wide cell", "x"), ("", "")]) == [
        "a          long",
        "---------  ----",
        "wide cell  x",
        "",
    ]
    assert table([("only", "header")]) == ["only  header", "----  ------"]


def attention(i: int, **options: Any) -> AttentionReport:
    fields: dict[str, Any] = {
        "block": f"layers.{i}.attn",
        "source": "model.py:12",
        "pattern": "sdpa",
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "value_dim": 64,
        "causal": True,
        "stack": 0,
        "reads": tuple(range(i)),
        "writes": (i,),
        "lowering": "cpu",
        "reason": "the tensors are on a CPU",
    }
    return AttentionReport(**fields | options)


def test_report_as_text() -> None:
    report = Report(
        config=MoDAConfig(),
        attentions=(
            attention(0),
            attention(1, masked=True, causal=False),
            attention(2, writes=(), causal=False, block="", stack=None, value_dim=128),
        ),
        refusals=(AttentionReport(block="x", source=None, pattern="sdpa", refusal="No."),),
        bystanders=(AttentionReport(block="y", source=None, pattern="sdpa", reason="Cross."),),
        costs=(("new parameters", "0", "0"),),
    )
    assert str(report).splitlines() == [
        "3 of 4 attentions converted to MoDA (ffn_kv='none', depth=True)",
        "",
        "#  block          pattern  heads  d       mask    stack  reads  writes  lowering",
        "-  -------------  -------  -----  ------  ------  -----  -----  ------  --------",
        "0  layers.0.attn  sdpa     8/2    64      causal  0      -      0       cpu",
        "1  layers.1.attn  sdpa     8/2    64      own     0      0      1       cpu",
        "2  (model)        sdpa     8/2    64/128  full    -      0-1    -       cpu",
        "  cpu: the tensors are on a CPU",
        "  source: model.py:12",
        "refused: x (None): No.",
        "left alone: y (None): Cross.",
        "",
        "cost            formula  here",
        "--------------  -------  ----",
        "new parameters  0        0",
    ]


def test_an_empty_report() -> None:
    report = Report(config=MoDAConfig(ffn_kv="shared"), attentions=())
    assert str(report).startswith("0 of 0 attentions converted to MoDA (ffn_kv='shared'")
    assert len(str(report).splitlines()) == 4


def test_reports_are_frozen() -> None:
    for thing in (attention(0), Report(config=MoDAConfig(), attentions=())):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.source = "x"  # type: ignore[union-attr, misc]
