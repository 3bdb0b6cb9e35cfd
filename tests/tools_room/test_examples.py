"""examples/ as a user starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_stock_gpt_with_structured_layers_learns(tmp_path: Path) -> None:
    sizes = ("--kind", "block_dense", "--rank", "48", "--blocks", "4", "--steps", "20")
    text = run(ROOT / "examples/megatron_gpt.py", *sizes, cwd=tmp_path)
    numbers = re.search(r"block_dense: loss ([\d.]+) at the first step, ([\d.]+) at the last", text)
    assert numbers, text
    assert float(numbers[2]) < float(numbers[1]) - 1


@pytest.mark.sweeps
def test_own_text_becomes_generated_text(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (tmp_path / "text" / f"{page.stem}.txt").write_text(
            page.read_text(encoding="utf-8"), encoding="utf-8"
        )
    script = ROOT / "examples/text_to_text.py"
    options = ("text", "--out", "made", "--steps", "10", "--prompt", "A structure", "model.layers=2")
    text = run(script, *options, cwd=tmp_path)
    commands = [line for line in text.splitlines() if line.startswith("$ python")]
    assert [Path(command.split()[2]).name for command in commands] == [
        *("pretrain.py", "pretrain.py", "convert.py"),
    ]
    generated = text.rsplit("exported\n", 1)[-1].strip()
    assert generated.startswith("A structure")
    assert len(generated) > 30
    again = run(script, *options, cwd=tmp_path)  # the same command goes on: the run is finished
    assert again.rsplit("\n\n", 1)[-1].strip().startswith("A structure")
