"""moda_compile.load and saved_config: what they read, and everything that must not load."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda_compile
from moda_compile import InputError, MoDAConfig, RewriteError
from moda_compile.markers import Saved
from tests.models.cases import IDS, PROJECTED, Bracketed, convert, stack
from tests.models.test_saving import CONFIGS, KEY, Same, load, saved, standing


def entry_of(content: Any) -> Tensor:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


# --- load: what it reads ------------------------------------------------------------------------


def to_torch(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def to_safetensors(state: dict[str, Any], folder: Path) -> Path:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def to_folder(state: dict[str, Any], folder: Path) -> Path:
    return to_safetensors(state, folder).parent


def to_shards(state: dict[str, Any], folder: Path) -> Path:
    """A file for each half of the entries, and what says which is where."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    names = list(state)
    files = {"one.safetensors": names[::2], "other.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, held in files.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


WRITERS = [to_torch, to_safetensors, to_folder, to_shards]


@pytest.mark.parametrize(
    ("config", "write"),
    [*((PROJECTED, write) for write in WRITERS), *((c, to_torch) for c in CONFIGS)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_load(config: MoDAConfig, write: Callable[..., Path], tmp_path: Path) -> None:
    state, logits = saved(config)
    path = write(state, tmp_path)
    assert moda_compile.saved_config(path) == moda_compile.saved_config(str(path)) == config
    model = stack(seed=5)
    with Same(model):
        assert load(model, path) is model
        assert torch.equal(model(IDS), logits)
        moda_compile.revert(model).load_state_dict(stack(seed=5).state_dict())
    assert moda_compile.saved_config(write(stack().state_dict(), tmp_path)) is None


def test_load_takes_converts_options() -> None:
    state, logits = saved(PROJECTED)
    model = load(stack(seed=5), state, backend="aot_eager", dynamic=False)
    assert moda_compile.convert(model, PROJECTED, (IDS,), "aot_eager", dynamic=False) is model
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-10)
    with Same(plain := stack()), pytest.raises(InputError, match="example_inputs"):
        load(plain, state, example_inputs=None)


def test_dtypes_are_the_models() -> None:
    state = {n: t if n == KEY else t.float() for n, t in saved(PROJECTED)[0].items()}
    model = load(stack(seed=5), state)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert torch.equal(model.head.weight, state["head.weight"].double())


def test_tied_weights_need_one_name() -> None:
    def tied(seed: int) -> Any:
        model = stack(seed=seed)
        model.head.weight = model.embedding.weight
        return model

    one = convert(tied(0), PROJECTED)
    state = one.state_dict()
    once = {n: t for n, t in state.items() if n != "head.weight"}
    for checkpoint in (state, once):
        model = load(tied(5), checkpoint)
        assert model.head.weight is model.embedding.weight
        assert torch.equal(model(IDS), one(IDS))
    with Same(model := tied(5)), pytest.raises(InputError, match="differ, but are one tensor"):
        load(model, state | {"head.weight": 2 * state["head.weight"]})
    with Same(model := stack()), pytest.raises(InputError, match="Missing: 'head.weight'"):
        load(model, once)


# --- load: what it refuses ----------------------------------------------------------------------

WEIGHT = "blocks.0.ffn.moda_key_weight"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "plain": (lambda s: stack().state_dict(), "plain model's.*moda_compile.convert afterwards"),
    "no weights": (lambda s: {KEY: s[KEY]}, "Missing: 'embedding.weight'.* and .* more"),
    "missing": (lambda s: {n: t for n, t in s.items() if n != WEIGHT}, f"Missing: '{WEIGHT}'"),
    "unexpected": (lambda s: s | {"x": s[WEIGHT]}, "Missing: none. Unexpected: 'x'"),
    "shape": (lambda s: s | {WEIGHT: s[WEIGHT][1:]}, f"{WEIGHT}: got .*expected torch.float64"),
    "dtype": (lambda s: s | {WEIGHT: s[WEIGHT].to(torch.complex64)}, "got torch.complex64"),
    "no tensor": (lambda s: s | {WEIGHT: "text"}, "got 'text', expected torch.float64"),
    "meta": (lambda s: s | {WEIGHT: s[WEIGHT].to("meta")}, "on the meta device"),
    "sparse": (lambda s: s | {WEIGHT: s[WEIGHT].to_sparse()}, "got .* torch.sparse_coo, exp"),
    "key": (lambda s: s | {3: s[WEIGHT]}, "got the key 3"),
    "a list": (lambda s: list(s.values()), "got list, expected a state_dict"),
    "entry": (lambda s: s | {KEY: s[KEY][:-1]}, "no JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refused(name: str) -> None:
    breaks, message = BROKEN[name]
    model = stack(seed=5)
    with Same(model), pytest.raises(InputError, match=message):
        load(model, breaks(saved(PROJECTED)[0]))


def test_refused_by_the_model() -> None:
    state, _ = saved(MoDAConfig())
    with Same(model := convert(stack())), pytest.raises(InputError, match="converted already"):
        load(model, state)
    with Same(model := convert(stack())), pytest.raises(InputError, match="part of another"):
        load(model.blocks[0], state)
    with Same(model := nn.Linear(9, 9)), pytest.raises(RewriteError, match="no attention"):
        load(model, state, example_inputs=(torch.zeros(2, 9),))
    with Same(model := Bracketed()), pytest.raises(InputError, match="Missing: 'stack.embedding"):
        load(model, state)
    with torch.device("meta"):
        empty = stack()
    with pytest.raises(InputError, match="to_empty"):
        load(empty, state, example_inputs=None)
    assert "forward" not in vars(empty)
    with pytest.raises(InputError, match="expected a torch.nn.Module"):
        load(lambda ids: ids, state)  # type: ignore[arg-type]


def test_a_failure_while_loading() -> None:
    """Such as in a hook of the model's own."""
    model = stack()

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    model.register_load_state_dict_pre_hook(fails)
    with Same(model), pytest.raises(ZeroDivisionError):
        load(model, saved(PROJECTED, seed=5)[0])


FIELDS = {"ffn_kv": "none", "depth": True, "accumulator_dtype": "float32"}
RIGHT: dict[str, Any] = {"format": 1, "strict": True, "config": FIELDS}
MALFORMED: list[tuple[Any, str]] = [
    (b"", "no JSON"),
    (b"{", "no JSON"),
    (b"\xff\xfe", "no JSON"),
    (b"[" * 60_000, "no JSON|expected format 1"),
    (b"9" * 5_000, "no JSON|expected format 1"),
    (b"__import__('os').abort()", "no JSON"),
    (b" " * 70_000, "at most 65536"),
    ([], "expected format 1"),
    ({}, "expected format 1"),
    (RIGHT | {"format": 2}, "got .*expected format 1; another version"),
    (RIGHT | {"format": True}, "expected format 1"),
    (RIGHT | {"format": "1"}, "expected format 1"),
    (RIGHT | {"extra": 1}, "extra.*expected the fields"),
    ({"format": 1, "config": FIELDS}, "expected the fields .*strict"),
    (RIGHT | {"strict": 1}, "strict: got 1"),
    (RIGHT | {"config": "none"}, "config: got 'none', expected the fields"),
    (RIGHT | {"config": None}, "config: got None"),
    (RIGHT | {"config": {}}, "config: got .., expected the fields"),
    (RIGHT | {"config": FIELDS | {"width": 3}}, "width"),
    (RIGHT | {"config": {"ffn_kv": "none", "depth": True}}, "accumulator_dtype"),
    (RIGHT | {"config": FIELDS | {"ffn_kv": "both"}}, "ffn_kv: got 'both'"),
    (RIGHT | {"config": FIELDS | {"ffn_kv": ["none"]}}, "ffn_kv: got"),
    (RIGHT | {"config": FIELDS | {"depth": 1}}, "depth: got 1"),
    (RIGHT | {"config": FIELDS | {"depth": None}}, "depth: got None"),
    (RIGHT | {"config": FIELDS | {"accumulator_dtype": "int8"}}, "accumulator_dtype: got"),
]
NO_TEXT: list[tuple[Any, str]] = [
    ("none", "got 'none', expected a tensor of bytes"),
    (None, "expected a tensor"),
    (torch.zeros(3), "torch.float32"),
    (torch.zeros(2, 2, dtype=torch.uint8), r"\[2, 2\]"),
    (torch.zeros((), dtype=torch.uint8), r"\[\]"),
    (torch.zeros(3, dtype=torch.uint8, device="meta"), "expected a tensor of bytes"),
]


def test_malformed_entries() -> None:
    plain, converted = stack(seed=5), standing(MoDAConfig())
    for entry, message in [*((entry_of(c), m) for c, m in MALFORMED), *NO_TEXT]:
        state = stack(seed=5).state_dict() | {KEY: entry}
        with pytest.raises(InputError, match=message):
            moda_compile.saved_config(state)
        with pytest.raises(InputError, match=f"x.{KEY}|MoDAConfig"):
            moda_compile.saved_config({f"x.{KEY}": entry}, prefix="x.")
        with Same(plain), pytest.raises(InputError, match=message):
            load(plain, state)
        with Same(converted), pytest.raises(InputError, match=message):
            converted.load_state_dict(state)


def test_what_is_right_is_taken() -> None:
    assert Saved.from_tensor(entry_of(RIGHT)) == Saved(config=MoDAConfig(), strict=True)


# --- files --------------------------------------------------------------------------------------


class Runs:
    """Pickled, it is a call of anything its writer likes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    state, _ = saved(MoDAConfig())
    path, ran = tmp_path / "state.pt", tmp_path / "ran"
    for content in (Runs(ran), state | {"head.weight": Runs(ran)}, standing(PROJECTED)):
        torch.save(content, path)
        with Same(model := stack()), pytest.raises(InputError, match="no file of tensors"):
            load(model, path)
        with pytest.raises(InputError, match="no file of tensors"):
            moda_compile.saved_config(path)
        assert not ran.exists()


def test_files_that_are_something_else(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(InputError, match="there is no file .*gone"):
        load(stack(), tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match="holds neither model.safetensors nor"):
        load(stack(), tmp_path)
    with pytest.raises(InputError, match="got int, expected a state_dict or a path"):
        load(stack(), 3)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="list.pt: got list"):
        load(stack(), tmp_path / "list.pt")
    for name, message in (("x.pt", "no file of tensors"), ("x.safetensors", "no safetensors file")):
        for content in (b"", b"nonsense" * 20):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=message):
                load(stack(), tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "no 'weight_map'"),
        ({"b": "gone.safetensors"}, "no file 'gone.safetensors' beside it"),
        ({"b": "../model.safetensors"}, "no file '../model.safetensors' beside it"),
        ({"b": "one.safetensors"}, "does not hold 'b'"),
    ],
)
def test_index(content: Any, message: str, tmp_path: Path) -> None:
    state, _ = saved(MoDAConfig())
    to_safetensors(state, tmp_path)
    (tmp_path / "folder").mkdir()
    folder = to_shards(state, tmp_path / "folder")
    index = folder / "model.safetensors.index.json"
    if isinstance(content, dict):
        whole = json.loads(index.read_text())
        content = json.dumps({"weight_map": whole["weight_map"] | content})
    index.write_text(content)
    for checkpoint in (folder, index):
        with Same(model := stack()), pytest.raises(InputError, match=message):
            load(model, checkpoint)


def test_a_folder_with_both(tmp_path: Path) -> None:
    """transformers saves shards beside an older save's only file, and would load that one."""
    old, new = saved(MoDAConfig()), saved(PROJECTED, seed=5)
    to_shards(new[0], to_folder(old[0], tmp_path))
    with Same(model := stack()), pytest.raises(InputError, match="holds both"):
        load(model, tmp_path)
    assert torch.equal(load(stack(), tmp_path / "model.safetensors")(IDS), old[1])
    assert torch.equal(load(stack(), tmp_path / "model.safetensors.index.json")(IDS), new[1])


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, logits = saved(MoDAConfig())
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match="takes safetensors.*pip install"):
        load(stack(), tmp_path)
    assert torch.equal(load(stack(seed=5), to_torch(state, tmp_path))(IDS), logits)
