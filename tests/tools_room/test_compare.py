"""tools/compare.py as a user starts it: real runs on the CPU, a restart, a run that fails, refusals."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

VARIANTS = "dense,low_rank+guide"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file and some real text."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text").mkdir()
    for name in ("argparse", "ast", "calendar"):
        text = (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text(encoding="utf-8")
        (folder / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    tree = {
        "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 32, "vocab": 512},
        "ffn": {"kind": "low_rank", "width": 128, "rank": 4},
        "data": {"dir": str(folder / "data"), "source": str(folder / "text"), "heldout_share": 0.34},
        "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 4},
        "precision": "fp32",
        "checkpoint": {"interval": 0},
        "evaluation": {"interval": 4, "sequences": 6},
        "sample": {"tokens": 0},
    }
    (folder / "tiny.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def compare(root: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(root / "tools" / "compare.py"),
        "--config",
        str(folder / "tiny.json"),
        *arguments,
    ]
    environment = os.environ | {"MPLCONFIGDIR": str(folder / "matplotlib")}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A comparison of two variants, both at once, with neither having prepared data."""
    out = folder / "out"
    root = Path(__file__).resolve().parents[2]
    return out, compare(
        root, folder, "--variants", VARIANTS, "--seeds", "3", "--jobs", "2", "--out", str(out)
    )


def test_table_rows_and_plot(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = whole
    assert done.returncode == 0, done.stdout + done.stderr
    dense, guided = rows(out / "comparison.csv")
    assert (dense["variant"], guided["variant"]) == ("dense", "low_rank+guide")
    assert {dense["seed"], guided["seed"]} == {"3"}
    assert abs(float(guided["flops"]) / float(dense["flops"]) - 1) < 0.05  # 12 steps: half a step is much
    assert int(guided["steps"]) > int(dense["steps"]) == 12
    for row in (dense, guided):
        summary = json.loads((out / row["run_dir"] / "summary.json").read_text())
        assert row["heldout_loss"] == str(summary["heldout_loss"])
        assert row["torch"]
        assert row["device"]
        assert "held-out loss" in (out / row["run_dir"] / "log.txt").read_text()
        held = json.loads((out / row["run_dir"] / "run.json").read_text())["config"]
        assert (held["train"]["seed"], held["evaluation"]["sequences"]) == (3, 6)
    table = (out / "comparison.md").read_text()
    assert table in done.stdout
    assert f"{float(guided['heldout_loss']):.4f}" in table
    assert "[2/2]" in done.stdout
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    points = [row for row in rows(out / "curves.csv") if row["variant"] == "dense"]
    assert [int(row["step"]) for row in points] == [4, 8, 12]
    assert float(points[-1]["flops"]) == float(dense["flops"])


def test_a_restart_trains_only_what_is_missing(
    root: Path, folder: Path, whole: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed_3/*") if path.is_file()}
    table = (out / "comparison.md").read_text()
    again = compare(root, folder, "--variants", VARIANTS, "--seeds", "3", "--no-plot", "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert "0 of 2 runs to train" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/seed_3/*") if path.is_file()}
    assert (out / "comparison.md").read_text() == table


def test_another_run_in_the_folder_is_refused(
    root: Path, folder: Path, whole: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    out, _ = whole
    done = compare(
        root, folder, "--variants", VARIANTS, "--seeds", "3", "--out", str(out), "train.learning_rate=0.1"
    )
    assert done.returncode == 2
    assert "variant dense seed 3: train.learning_rate = 0.1: run.dir" in done.stderr


def test_others_go_on_where_one_fails(
    root: Path, folder: Path, whole: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    """A run that cannot write its record; the others are there already."""
    out, _ = whole
    (out / "dense_narrow" / "seed_3" / "metrics.jsonl").mkdir(parents=True)
    done = compare(root, folder, "--variants", f"dense_narrow,{VARIANTS}", "--seeds", "3", "--out", str(out))
    assert done.returncode == 1
    assert "dense_narrow seed 3: FAILED, ended with exit code" in done.stdout
    assert "metrics.jsonl" in done.stdout, "the end of its log is shown"
    assert "1 of 3 runs failed: dense_narrow seed 3" in done.stderr
    assert [row["variant"] for row in rows(out / "comparison.csv")] == ["dense", "low_rank+guide"]


def test_plan_trains_nothing(root: Path, folder: Path) -> None:
    done = compare(
        root,
        folder,
        "--variants",
        "dense,block_dense,low_rank:rank=8",
        "--out",
        str(folder / "none"),
        "--plan",
    )
    assert done.returncode == 0, done.stderr
    assert "| `low_rank:rank=8`" in done.stdout
    assert "100.0%" in done.stdout
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variants", "dense,monarch"], "variant 'monarch': must read"),
        (["--variants", "dense", "--seeds", "x"], "--seeds x: 'x' is no seed"),
        (
            ["--variants", "dense,low_rank:rank=64"],
            "variant low_rank:rank=64: ffn.rank = 64: must not exceed",
        ),
        (
            ["--variants", "dense", "parallel.tensor=2"],
            "variant dense seed 0: parallel.tensor = 2: must divide the number of ranks, 1",
        ),
        (["--variants", "dense", "data.source=/nowhere"], "variant dense seed 0: data.source"),
        (["--variants", "dense", "--jobs", "0"], "--jobs 0"),
        (["--variants", "dense", "--jobs", "two"], "invalid int value: 'two'"),
    ],
)
def test_bad_input_is_refused_before_the_first_run(
    root: Path, folder: Path, arguments: list[str], says: str
) -> None:
    done = compare(root, folder, *arguments, "--out", str(folder / "refused"))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "refused").exists()
