"""tools/gpu.py, which has no minute for a typo: end to end at tiny sizes on the CPU."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sffn_bench import roofline

from sffn_dist.spec import loading


@pytest.fixture(scope="module")
def gpu(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_tool", root / "tools" / "gpu.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_from_the_first_piece_to_the_page(root: Path, tmp_path: Path) -> None:
    """A piece that fails stays left, and is run again by the next call."""
    command = [sys.executable, str(root / "tools" / "gpu.py"), "--tiny", "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work")]
    (tmp_path / "out" / "decode.csv").mkdir(parents=True)
    first = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert first.returncode == 1, first.stdout + first.stderr
    state = json.loads((tmp_path / "work" / "pieces.json").read_text())
    assert {name for name, entry in state.items() if entry["code"]} == {"decode"}, first.stdout
    assert first.stdout.splitlines()[-1] == "left: decode; call again"
    assert "skipped" in (tmp_path / "work" / "tests.log").read_text()
    (tmp_path / "out" / "decode.csv").rmdir()
    second = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert second.returncode == 0, second.stdout + second.stderr
    assert [line for line in second.stdout.splitlines() if "exit code" in line] == [
        line for line in second.stdout.splitlines() if line.startswith("decode: exit code 0")
    ]
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.count("| 0 |") == len(state)
    runs = list(csv.DictReader((tmp_path / "out" / "train.csv").open()))
    assert [row["run"] for row in runs] == ["train_wide_blockdiag", "train_xl_low_rank_32", "train_xl_dense"]
    assert all(float(row["tokens_per_s"]) > 0 and int(row["steps"]) == 6 for row in runs)
    rows = [line for line in page.splitlines() if "times faster" in line]
    assert len(rows) == 6 + 3 + 1
    assert not [line for line in rows if "not measured" in line], page


def test_what_falls_short_is_marked(gpu: ModuleType) -> None:
    def row(kind: str, share: float, speedup: float, **more: Any) -> dict[str, str]:
        cells = {"mode": "forward_backward", "provider": "ours", "width": 2048, **more}
        return {key: str(value) for key, value in {**cells, "kind": kind, "share": share}.items()} | {
            "speedup_over_dense": str(speedup)
        }

    layers = [
        row("low_rank", 0.3125, 2.9),
        row("low_rank", 0.3125, 9.0, provider="bmm"),
        row("low_rank", 0.3125, 9.0, mode="forward"),
        row("block_dense", 0.293, 2.7),
        row("block_shuffle", 0.3125, 2.6),
        row("low_rank", 0.625, 1.2),
    ]
    runs = [
        {"run": "train_xl_dense", "step_seconds": 3.0, "mfu": 0.5},
        {"run": "train_xl_low_rank_32", "step_seconds": 2.0, "mfu": 0.4},
    ]
    listed = gpu.targets(layers, [], runs)
    assert [target.met for target in listed] == [
        *(True, False, True, False, None, None),
        *(None, None, None),
        *(False, True, False),
    ]


def test_a_run_is_set_beside_its_prediction(
    gpu: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose data sheet is known: of eight micro-steps and an update, measured as twice that."""
    monkeypatch.setattr(gpu, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    piece = next(
        piece for piece in gpu.pieces(tmp_path, tmp_path, tiny=False) if piece.name == "train_xl_low_rank_32"
    )
    overrides = (*piece.overrides, "precision=bf16")
    predicted = roofline.predict(loading.load(str(root / piece.config), overrides), roofline.rates_of("H100"))
    piece.run_dir.mkdir()
    row = {"skipped": False, "loss": 2.0, "seconds": 2 * predicted.step, "flops": 1e12}
    (piece.run_dir / "metrics.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    found = gpu.run_figures(dataclasses.replace(piece, overrides=overrides))
    assert found["predicted_step_seconds"] == predicted.step
    assert found["predicted_micro_step_seconds"] == predicted.micro_step
    assert found["measured_over_predicted"] == pytest.approx(2)
    assert found["micro_steps"] == 8
    page = gpu.page(tmp_path, {}, [found])
    assert "| step_seconds | predicted_step_seconds | measured_over_predicted |" in page
    assert f"| {2 * predicted.step:.4g} | {predicted.step:.4g} | 2 |" in page
    assert "by config and data sheet alone" in page
    monkeypatch.setattr(gpu, "device_name", lambda: "a CPU")
    found = gpu.run_figures(dataclasses.replace(piece, overrides=overrides))
    assert found["predicted_step_seconds"] is None
    assert found["measured_over_predicted"] is None


def test_without_a_device_it_says_so(root: Path) -> None:
    done = subprocess.run([sys.executable, str(root / "tools" / "gpu.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no CUDA device here" in done.stderr
    unknown = [sys.executable, str(root / "tools" / "gpu.py"), "--tiny", "--list", "--only", "ffn_63"]
    done = subprocess.run(unknown, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--only ffn_63: must be of tests, train_wide_blockdiag" in done.stderr
