"""What benchmarks write, and the README's table of it."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import compile_time  # noqa: E402
import host_profile  # noqa: E402
import plain_stack  # noqa: E402
import readme  # noqa: E402
import results  # noqa: E402

from moda_compile import MoDAConfig  # noqa: E402
from moda_compile.testing import check_conversion  # noqa: E402
from tests.kernels.compiled import compile_for_h100  # noqa: E402

ROWS = [
    {"T": 1024, "kind": "a", "ratio": 0.51234, "floor": 0.5},
    {"T": 2048, "kind": "a", "ratio": 1234.5, "floor": None},
    {"T": 1024, "kind": "b", "ratio": None, "floor": None},
    {"T": 2048, "kind": "b", "ratio": 0.75, "floor": 0.5},
]


@pytest.fixture
def published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str]:
    script = str(ROOT / "benchmarks" / "model.py")
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path), "--jobs", "2"])
    results.publish(
        "model",
        "A title",
        ROWS,
        claims=[("one thing", "0.512"), ("another", "3")],
        picture=results.Picture(x="T", ys=("ratio",), split="kind", floor="floor", log_x=True),
        setting="how it was",
        folder=tmp_path,
    )
    found = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    return found, capsys.readouterr().out


def test_nothing_is_written_of_no_rows(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="model: no row was measured"):
        results.publish("model", "A title", [], claims=[], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_written(published: Any, tmp_path: Path) -> None:
    found, _ = published
    assert found["command"] == "PYTHONPATH=. python benchmarks/model.py --jobs 2"
    assert found["versions"]["torch"] == torch.__version__
    assert found["rows"] == ROWS
    pytest.importorskip("matplotlib")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_printed(published: Any) -> None:
    lines = published[1].splitlines()
    assert lines[0] == "A title"
    assert lines[3] == "how it was"
    assert [line.split() for line in lines[5:]] == [
        ["T", "kind", "ratio", "floor"],
        ["-----", "----", "-----", "-----"],
        ["1,024", "a", "0.512", "0.5"],
        ["2,048", "a", "1,234", "-"],
        ["1,024", "b", "-", "-"],
        ["2,048", "b", "0.75", "0.5"],
    ]


def test_the_tables_of_the_readme(published: Any, tmp_path: Path) -> None:
    here, found = readme.short(results.machine()), published[0]
    command = "`python benchmarks/model.py --jobs 2`"
    first, _, title, _, head, line, *claims = readme.render(tmp_path).splitlines()
    assert first.startswith(f"- {here}: ") and f"torch {torch.__version__}" in first
    assert title == "### Whole models"
    assert (head, line) == (f"| what | {here} | made by |", "| --- | --- | --- |")
    files = f"{here} [rows](benchmarks/results/model.json), [picture](benchmarks/results/model.png)"
    assert claims == [
        f"| one thing | 0.512 | {command}: {files} |",
        "| another | 3 | the same |",
    ]
    # Another machine's figures stand in the same rows, and what only it has below them.
    other = found | {"machine": "NVIDIA A1 80GB", "claims": [["another", "4"], ["a third", "5"]]}
    other |= {"command": f"{found['command']}; later benchmarks/model.py --jobs 1"}
    (tmp_path / "model_a1.json").write_text(json.dumps(other), encoding="utf-8")
    machines, table = readme.render(tmp_path).split("\n\n### Whole models\n\n")
    assert machines.splitlines()[1].startswith("- A1: NVIDIA A1 80GB, torch ")
    head, _, *claims = table.splitlines()
    assert head == f"| what | {here} | A1 | made by |"
    rest = "A1 [rows](benchmarks/results/model_a1.json), [picture](benchmarks/results/model_a1.png)"
    assert claims == [
        f"| one thing | 0.512 |  | {command}: {files}<br>{command} and 1 more: {rest} |",
        "| another | 3 | 4 | the same |",
        "| a third |  | 5 | the same |",
    ]
    # Of the same command there is one; a machine has a column only where it has a figure.
    (tmp_path / "memory_a1.json").write_text(json.dumps(other), encoding="utf-8")
    (tmp_path / "sanitize_a1.json").write_text(json.dumps(other), encoding="utf-8")
    (tmp_path / "model_a1.json").write_text(
        json.dumps(other | {"command": found["command"]}), encoding="utf-8"
    )
    models, right = readme.render(tmp_path).split("\n\n### Correctness\n\n")
    assert f" {command}: {files}, {rest} |" in models
    assert right.startswith("| what | A1 | made by |\n| --- | --- | --- |\n| another | 4 | ")


def test_what_differs_from_a_machine_s_versions_is_said(published: Any, tmp_path: Path) -> None:
    found = published[0]
    same = {k: v for k, v in found["versions"].items() if k == "torch"}  # of the rest it is silent
    for name, versions in (("memory", same), ("decode", same | {"torch": "1.0"})):
        other = found | {"versions": versions, "picture": None}
        (tmp_path / f"{name}.json").write_text(json.dumps(other), encoding="utf-8")
    text = readme.render(tmp_path)
    assert "[rows](benchmarks/results/memory.json) |" in text
    assert f"[rows](benchmarks/results/decode.json) ({found['machine']}, torch 1.0) |" in text


def test_tables_are_put_between_their_markers() -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter"
    assert readme.put_into(text, "new") == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter"
    with pytest.raises(ValueError, match="figures:begin"):
        readme.put_into("no place", "new")


def test_the_readme_says_what_the_results_say() -> None:
    text = readme.README.read_text(encoding="utf-8")
    again = "run PYTHONPATH=. python benchmarks/readme.py"
    assert readme.put_into(text, readme.render(readme.FOLDER)) == text, again
    for name, found in readme.found(readme.FOLDER):
        if found["picture"] is not None:
            assert (readme.FOLDER / f"{name}.png").exists()


def test_every_file_of_results_is_in_the_table() -> None:
    names = {file.stem for file in readme.FOLDER.glob("*.json")}
    assert names == {name for name, _ in readme.found(readme.FOLDER)}


def test_rows_that_were_printed_as_they_came_are_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.publish("memory", "A title", ROWS, claims=[], folder=tmp_path, printed=True)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["rows"] == ROWS


def test_a_file_without_a_picture_is_not_drawn(tmp_path: Path) -> None:
    results.publish("memory", "A title", ROWS, claims=[], folder=tmp_path)
    assert not (tmp_path / "memory.png").exists()


def test_out_is_an_option() -> None:
    parser = argparse.ArgumentParser()
    results.add_arguments(parser)
    assert parser.parse_args([]).out == readme.FOLDER


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_plain_stack_converts(kv_heads: int) -> None:
    shape = plain_stack.Shape(
        layers=3, width=32, heads=4, kv_heads=kv_heads, head_dim=8, ffn=48, batch=2, tokens=7
    )
    model = plain_stack.Stack(shape)
    x = shape.inputs("cpu", torch.float32)
    assert x.requires_grad
    check_conversion(model, (x.detach(),), MoDAConfig(), backend="aot_eager")


def test_rows_of_a_later_run_take_their_places(tmp_path: Path) -> None:
    def row(layers: int, batch: int, ratio: float) -> dict[str, Any]:
        own = {"layers": layers, "B": batch, "ffn_kv": "none", "of plain": ratio, "floor": 0.9}
        return {"shape": f"{layers} layers", "T": 8, **own}

    def write(name: str, rows: list[dict[str, Any]], **changed: Any) -> Path:
        found = {
            "title": "A title", "command": f"PYTHONPATH=. python benchmarks/{name}.py --jobs 3",
            "machine": "a GPU", "versions": {}, "setting": "", "rows": rows, "claims": [],
            "picture": None,
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(found | changed), encoding="utf-8")
        return tmp_path / f"{name}.json"

    old = write("model", [row(16, 1, 0.5), row(16, 8, 0.6), row(20, 1, 0.7)])
    by = ["layers", "B", "ffn_kv"]
    results.merge(old, write("later", [row(16, 8, 0.8)]), by)
    found = json.loads(old.read_text(encoding="utf-8"))
    assert [x["of plain"] for x in found["rows"]] == [0.5, 0.8, 0.7]
    command = "PYTHONPATH=. python benchmarks/model.py --jobs 3; later benchmarks/later.py --jobs 3"
    assert found["command"] == command
    assert found["claims"][1][1] == "`none` 0.800 (floor 0.9)"
    old = old.rename(tmp_path / "model_other.json")  # of another machine: the same benchmark's
    results.merge(old, write("later", [row(20, 1, 0.75)]), by)
    before = old.read_bytes()
    assert [x["of plain"] for x in json.loads(before)["rows"]] == [0.5, 0.8, 0.75]
    assert json.loads(before)["command"] == command  # once, though it was run twice
    for other in (
        write("another", [row(36, 1, 0.8)]),
        write("elsewhere", [row(16, 8, 0.9)], machine="another GPU"),
    ):
        with pytest.raises(ValueError, match=r"no row with|machine"):
            results.merge(old, other, by)
    assert old.read_bytes() == before
    results.merge(old, write("rest", [row(36, 1, 0.8), row(16, 1, 0.4)]), by, add=True)
    ratios = [x["of plain"] for x in json.loads(old.read_bytes())["rows"]]
    assert ratios == [0.4, 0.8, 0.75, 0.8]


def test_a_tree_of_calls() -> None:
    tree = host_profile.Call()
    tree.add(["a", "b", "c"], 2.0)
    tree.add(["a", "b", "d"], 1.0)
    tree.add(["a", "b", "e"], 0.01)
    assert list(tree.lines("all")) == ["  3.01 b", "    2.00 c", "    1.00 d"]


def test_stacks_are_looked_at_while_a_thread_works() -> None:
    tree, done = host_profile.Call(), threading.Event()
    sampler = threading.Thread(target=host_profile.sample, args=(tree, threading.get_ident(), done))
    sampler.start()

    def a_function_that_waits() -> None:
        time.sleep(0.5)

    a_function_that_waits()
    done.set()
    sampler.join()
    assert any(line.endswith("test_results.py a_function_that_waits") for line in tree.lines("all"))


def test_time_without_a_look_and_collections_stand_apart() -> None:
    tree, done = host_profile.Call(), threading.Event()
    sampler = threading.Thread(target=host_profile.sample, args=(tree, threading.get_ident(), done))
    collections = host_profile.Collections()
    gc.disable()  # there are only those that are asked for
    gc.callbacks.append(collections)
    sampler.start()
    sum(range(50_000_000))  # one call of C, which keeps Python to itself
    gc.collect(1)
    assert collections.count == 0
    gc.collect()
    done.set()
    sampler.join()
    gc.callbacks.remove(collections)
    gc.enable()
    assert tree.inner["not looked at"].seconds > 0.1
    assert collections.count == 1
    assert collections.seconds > 0


def test_kernels_that_are_in_triton_s_cache_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    visible = pytest.importorskip("moda_compile.kernels.visible")
    if visible.launch.EMULATED:
        pytest.skip("the kernels are interpreted")
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    for variable, folder in compile_time.caches(str(tmp_path)).items():
        monkeypatch.setenv(variable, folder)
    names = compile_time.compiled_here()
    pointers = {"mask": "*i1", "visible": "*i32"}
    for chunk in (64, 64, 128):
        compile_for_h100(visible.visible_keys_kernel, pointers, {"BOOL": True, "CHUNK": chunk})
    assert names == ["visible_keys_kernel"] * 2
