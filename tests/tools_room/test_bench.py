"""tools/bench.py as a user starts it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sffn_dist import machine


def bench(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def rows(root: Path, *arguments: str) -> list[dict[str, Any]]:
    done = bench(root, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_what_travels_beside_dense(root: Path) -> None:
    """h 2048, f 8192: low_rank of rank 512, block_dense of rank 768 in 4 blocks, block_shuffle of 4 blocks, as a share of dense."""
    found = {(row["kind"], row["p"]): row for row in rows(root, "comm")}
    assert {p for _, p in found} == {2, 4, 8}
    for p, shuffle in ((2, 0.75), (4, 0.625), (8, 0.375)):
        assert found["dense", p]["elements"] == 2 * 2048 * (p - 1) / p
        assert found["dense", p]["backward"] == 3 * 2048 * (p - 1) / p
        assert found["low_rank", p]["ratio_to_dense"] == 0.25
        assert found["low_rank", p]["gradients"] == 4 * 2048 * 512 / 8192 * (p - 1) / p
        assert found["block_dense", p]["ratio_to_dense"] == (768 + 768 / min(4, p)) / 4096
        assert found["block_dense", p]["ratio_to_dense"] <= 0.29
        assert found["block_shuffle", p]["ratio_to_dense"] == shuffle


def test_every_provider_is_timed(root: Path, tmp_path: Path) -> None:
    """Two real ranks, a layer so small that the times say nothing."""
    sizes = ["--width", "32", "--tokens", "16", "--repeats", "2", "--sequence", "both"]
    found = rows(root, "tp", *sizes, "--csv", str(tmp_path / "rows.csv"))
    kinds, providers = {"low_rank", "block_dense", "block_shuffle"}, {"dense", "naive", "bottleneck", "recomputed"}
    assert {(row["kind"], row["provider"], row["sequence"]) for row in found} == {
        (kind, provider, sequence) for kind in kinds for provider in providers for sequence in (True, False)
    }
    for row in found:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert (row["p"], row["repeats"], row["op"]) == (2, 2, "ffn_tensor_parallel")
        assert row["speedup_over_dense"] > 0
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["median_ms"] for row in written] == [str(row["median_ms"]) for row in found]


def test_the_guide_is_timed(root: Path) -> None:
    """One rank; the ratios are those of the medians beside them."""
    found = {
        (row["kind"], row["provider"]): row for row in rows(root, "guide", "--width", "32", "--tokens", "16", "--repeats", "2")
    }
    kinds, providers = ("low_rank", "block_dense", "block_shuffle"), ("dense", "unguided", "undrawn", "guided", "three_passes")
    assert list(found) == [(kind, provider) for kind in kinds for provider in providers]
    for (kind, _), row in found.items():
        assert (row["op"], row["repeats"], row["threads"]) == ("ffn_guided", 2, machine.cores())
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        unguided, dense, plain = (found[kind, name]["median_ms"] for name in ("unguided", "dense", "three_passes"))
        assert row["over_unguided"] == pytest.approx(row["median_ms"] / unguided, rel=0.01, abs=0.01)
        assert row["over_dense"] == pytest.approx(row["median_ms"] / dense, rel=0.01, abs=0.01)
        assert row["speedup_over_three_passes"] == pytest.approx(plain / row["median_ms"], rel=0.01, abs=0.01)


def test_saves_are_timed_and_leave_nothing(root: Path, tmp_path: Path) -> None:
    """12 MB of state, cut off in the paper's smallest model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = ["--gigabytes", "0.012", "--repeats", "2", "--folder", str(disk)]
    found = rows(root, "checkpoint", *sizes, "--csv", str(tmp_path / "rows.csv"))
    assert [row["provider"] for row in found] == ["sync", "async"]
    for row in found:
        assert (row["op"], row["mode"], row["gigabytes"], row["repeats"]) == ("checkpoint", "save", 0.012, 2)
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["median_ms"] <= 1e3 * row["total_s"] + 1
        assert row["first_ms"] > 0
        assert row["gb_per_s"] == pytest.approx(0.012 / row["total_s"], rel=0.1, abs=0.001)
        assert row["over_sync"] == pytest.approx(row["median_ms"] / found[0]["median_ms"], abs=1e-3)
    assert list(disk.iterdir()) == []
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        assert [row["first_ms"] for row in csv.DictReader(file)] == [str(row["first_ms"]) for row in found]


def test_interrupted_saves_leave_nothing(root: Path, tmp_path: Path) -> None:
    """Ctrl-C at a terminal: to the whole process group, once files are being written."""
    arguments = ["checkpoint", "--gigabytes", "0.3", "--repeats", "99", "--folder", str(tmp_path)]
    command = [sys.executable, str(root / "tools" / "bench.py"), *arguments]
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert bench.poll() is None
    os.killpg(bench.pid, signal.SIGINT)
    assert bench.wait(60) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "structure",
    [{"kind": "low_rank", "rank": 6}, {"kind": "block_dense", "rank": 8, "blocks": 4}, {"kind": "block_shuffle", "blocks": 4}],
    ids=lambda structure: structure["kind"],
)
def test_the_guide_in_three_passes_is_the_same_layer(root: Path, ranks: Callable[..., Any], structure: dict[str, Any]) -> None:
    """What the benchmark compares the guided layer with computes the same output and the same gradients."""
    cases = root / "tests" / "distributed" / "naive_cases.py"
    (errors,) = ranks(1).run(cases, "three_passes_errors", structure=structure, h=16, f=32, alpha=0.3)
    assert len(errors) == 2 + 6  # y, x; two factors and the guide of each linear
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["comm", "--ranks", "3"], "--tokens 8192: must be divisible by --ranks 3"),
        (["comm", "--blocks", "5"], "--blocks 5: must divide --width 2048"),
        (["comm", "--ranks", "8", "--inner", "2056"], "--blocks 4: its square must divide --inner 2056"),
        (["comm", "--rank", "9000"], "--rank 9000: must not exceed 2048"),
        (["tp", "--csv", "nowhere/rows.csv"], "--csv nowhere/rows.csv: there is no folder"),
        (["tp", "--repeats", "1"], "--repeats 1: must be at least 2"),
        (["tp", "--blocks", "1"], "--blocks 1: must be divisible by --ranks 2"),
        (["tp", "--ranks", "0"], "--ranks: 0 is not above 0"),
        (["tp", "--width", "wide"], "--width"),
        (["tp", "--tokens", "7"], "--tokens 7: must be divisible by --ranks 2"),
        (["tp", "--width", "2", "--blocks", "2"], "--blocks 2: must divide --block-rank 1"),
        (["guide", "--ranks", "2"], "unrecognized arguments: --ranks 2"),
        (["guide", "--repeats", "1"], "--repeats 1: must be at least 2"),
        (["guide", "--blocks", "3"], "--blocks 3: must divide --width 1024"),
        (["guide", "--block-rank", "6"], "--blocks 4: must divide --block-rank 6"),
        (["guide", "--rank", "1025"], "--rank 1025: must not exceed 1024"),
        (["guide", "--tokens", "-1"], "--tokens: -1 is not above 0"),
        (["checkpoint", "--gigabytes", "0"], "--gigabytes 0: must be above 0 and not exceed 8.7"),
        (["checkpoint", "--gigabytes", "1e6"], "--gigabytes 1e+06: must be above 0 and not exceed 8.7"),
        (["checkpoint", "--gigabytes", "nan"], "--gigabytes nan: must be above 0"),
        (["checkpoint", "--folder", "nowhere"], "--folder nowhere: there is no such folder"),
        (["checkpoint", "--folder", "/proc"], "--gigabytes 1.2: needs 3.61 GB, 0 GB free on the disk of --folder /proc"),
        (["checkpoint", "--repeats", "1"], "--repeats 1: must be at least 2"),
        (["checkpoint", "--csv", "nowhere/rows.csv"], "--csv nowhere/rows.csv: there is no folder"),
        (["guide", "--csv", "nowhere/rows.csv"], "--csv nowhere/rows.csv: there is no folder"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(root: Path, arguments: list[str], says: str) -> None:
    done = bench(root, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
