"""Every example runs from the command line, in its quick form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_train_shakespeare(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "demo.png"
    out = run_example("train_shakespeare.py", "--quick", "--device", "cpu", "--out", picture)
    for variant in ("plain", "none", "projected"):
        assert re.search(rf"^{variant} +\d\.\d+ ± ", out, flags=re.MULTILINE)
    differences = re.findall(r"compiled and eager logits differ by at most (\S+)", out)
    assert len(differences) == 2
    # Logits are of order 1 and both sides compute in float32 (eps 1.2e-7) through two layers of a
    # few hundred additions each; another function differs in the third digit.
    assert all(float(difference) < 2e-5 for difference in differences)
    assert "After 4 steps, ffn_kv='none' ended" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_convert_pretrained():
    pytest.importorskip("transformers")
    out = run_example("convert_pretrained.py", "--quick", "--device", "cpu")
    losses = re.findall(
        r"^  (before conversion|converted.*?|plain.*?) +(\d+\.\d+)$", out, re.MULTILINE
    )
    assert [name for name, _ in losses] == [
        "before conversion",
        "converted, untrained",
        "converted, 2 steps",
        "plain, 2 steps",
    ]
    # The rewrite is not a no-op.
    assert losses[0][1] != losses[1][1]


@pytest.mark.slow
def test_generate():
    pytest.importorskip("transformers")
    out = run_example("generate.py", "--quick", "--device", "cpu", "--prompt", "To be")
    rows = re.findall(
        r"^(plain, eager|without depth|with depth) +[\d.]+ tokens/s +([\d.]+) MB", out, re.M
    )
    assert [name for name, _ in rows] == ["plain, eager", "without depth", "with depth"]
    assert len({size for _, size in rows}) == 1  # no depth KV is cached
    texts = re.findall(r"^--- with(?:out)? depth\n(To be.*?)(?=\n\n---|\Z)", out, re.M | re.S)
    assert len(texts) == 2 and texts[0].strip() != texts[1].strip()


def test_kv_cache():
    out = run_example("kv_cache.py", "--quick", "--device", "cpu", "--ffn-kv", "shared")
    (difference,) = re.findall(r"logits of any step and of one pass differ by (\S+)", out)
    assert float(difference) < 2e-5  # as above
    assert "behind 4 steps of warm-up: 0 graphs compiled" in out


@pytest.mark.slow
def test_custom_pattern():
    pytest.importorskip("hypothesis")  # the extra `testing`
    out = run_example("custom_pattern.py", "--layers", "3", "--backend", "aot_eager")
    assert out.startswith("Before: 3 attentions refused, because attention is an attention whose")
    assert "3 of 3 attentions converted to MoDA" in out
    rows = re.findall(r"^\d +(\d) +example +4/2 +8 +(\w+) ", out, re.MULTILINE)
    assert [block for block, _ in rows] == ["0", "1", "2"]
    assert rows[0][1] == rows[2][1] == "causal" != rows[1][1]
    # 16 parameters a layer and the output: the example raises if any of them is off.
    assert "49 of 49 outputs and gradients agree with the float64 oracle." in out
