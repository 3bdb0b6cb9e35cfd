"""tools/bench.py as a user starts it."""

from __future__ import annotations

import csv
import importlib.util
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

from sffn_dist.spec import machine


def bench(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def rows(root: Path, *arguments: str) -> list[dict[str, Any]]:
    done = bench(root, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_table_that_cannot_be_written_is_refused_before_the_work(root: Path, tmp_path: Path) -> None:
    done = bench(root, "comm", "--csv", str(tmp_path))
    assert done.returncode == 2
    assert f'--csv = "{tmp_path}": cannot be used: {tmp_path}: Is a directory; ' in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_what_travels_beside_dense(root: Path) -> None:
    """h 2048, f 8192: low_rank of rank 512, block_dense of rank 768 in 4 blocks, block_shuffle of 4
    blocks, as a share of dense.
    """
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
    kinds, providers = (
        {"low_rank", "block_dense", "block_shuffle"},
        {"dense", "naive", "bottleneck", "recomputed"},
    )
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
        (row["kind"], row["provider"]): row
        for row in rows(root, "guide", "--width", "32", "--tokens", "16", "--repeats", "2")
    }
    kinds, providers = (
        ("low_rank", "block_dense", "block_shuffle"),
        ("dense", "unguided", "undrawn", "guided", "three_passes"),
    )
    assert list(found) == [(kind, provider) for kind in kinds for provider in providers]
    for (kind, _), row in found.items():
        assert (row["op"], row["repeats"], row["threads"]) == ("ffn_guided", 2, machine.cores())
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        unguided, dense, plain = (
            found[kind, name]["median_ms"] for name in ("unguided", "dense", "three_passes")
        )
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
    bench = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # a shell's background job ignores SIGINT, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert bench.poll() is None
    os.killpg(bench.pid, signal.SIGINT)
    assert bench.wait(60) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "structure",
    [
        {"kind": "low_rank", "rank": 6},
        {"kind": "block_dense", "rank": 8, "blocks": 4},
        {"kind": "block_shuffle", "blocks": 4},
    ],
    ids=lambda structure: structure["kind"],
)
def test_the_guide_in_three_passes_is_the_same_layer(
    root: Path, ranks: Callable[..., Any], structure: dict[str, Any]
) -> None:
    """What the benchmark compares the guided layer with computes the same output and the same gradients."""
    cases = root / "tests" / "distributed" / "naive_cases.py"
    (errors,) = ranks(1).run(cases, "three_passes_errors", structure=structure, h=16, f=32, alpha=0.3)
    assert len(errors) == 2 + 6  # y, x; two factors and the guide of each linear
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


KINDS = ("low_rank", "block_dense", "block_shuffle")
SHARES = {"low_rank": (0.3125, 0.625), "block_dense": (0.293, 0.5859), "block_shuffle": (0.3125, 0.625)}


def test_layers_are_timed(root: Path, tmp_path: Path) -> None:
    """On the CPU: every provider of every structure and share, beside the least work by hand."""
    arguments = ["ffn", "--device", "cpu", "--width", "64", "--tokens", "32", "--repeats", "2"]
    found = rows(root, *arguments, "--csv", str(tmp_path / "rows.csv"))
    structured = [(kind, share) for kind in KINDS for share in SHARES[kind]]
    forward = [(*one, "forward", name) for one in structured for name in ("bmm", "ours")]
    training = [
        (*one, "forward_backward", name) for one in structured for name in ("bmm", "ours", "ours_bottleneck")
    ]
    want = [
        ("dense", 1.0, "forward", "dense"),
        *forward,
        ("dense", 1.0, "forward_backward", "dense"),
        *training,
    ]
    assert [(row["kind"], row["share"], row["mode"], row["provider"]) for row in found] == want
    dense = {row["mode"]: row["median_ms"] for row in found if row["kind"] == "dense"}
    for row in found:
        assert (row["op"], row["tokens"], row["width"], row["inner"], row["dtype"]) == (
            "ffn",
            32,
            64,
            256,
            "float32",
        )
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["speedup_over_dense"] == pytest.approx(dense[row["mode"]] / row["median_ms"], rel=1e-4)
        weights = matrices(row)
        passes, parameters, tokens = (1, 1, 2) if row["mode"] == "forward" else (3, 2, 4)
        assert row["gflop"] == pytest.approx(1e-9 * passes * 2 * 32 * weights, rel=1e-5)
        assert row["gbytes"] == pytest.approx(
            4e-9 * (parameters * (weights + 256 + 64) + tokens * 32 * 64), rel=1e-5
        )
        assert row["peak_mb"] is row["floor_ms"] is None
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        assert [row["median_ms"] for row in csv.DictReader(file)] == [str(row["median_ms"]) for row in found]


def matrices(row: dict[str, Any]) -> int:
    """Elements of both linears' factors, written out."""
    h, f, r, b = row["width"], row["inner"], row["rank"], row["blocks"]
    counts: dict[str, Callable[[], int]] = {
        "dense": lambda: 2 * h * f,
        "low_rank": lambda: 2 * r * (h + f),
        "block_dense": lambda: r * (h + f) // b + r * (h + f),
        "block_shuffle": lambda: 2 * h * (h + f) // b,
    }
    return counts[row["kind"]]()


def test_a_training_step_is_timed(root: Path) -> None:
    arguments = [
        "step",
        "--device",
        "cpu",
        "--width",
        "64",
        "--tokens",
        "32",
        "--repeats",
        "2",
        "--shares",
        "32",
    ]
    found = rows(root, *arguments)
    providers = [(kind, name) for kind in KINDS for name in ("bmm", "ours", "ours_bottleneck")]
    assert [(row["kind"], row["provider"]) for row in found] == [("dense", "dense"), *providers]
    for row in found:
        assert (row["op"], row["mode"], row["repeats"]) == ("step", "training", 2)
        assert row["gflop"] == pytest.approx(6e-9 * 32 * matrices(row), rel=1e-5)
        assert row["gbytes"] == pytest.approx(4e-9 * (9 * (matrices(row) + 320) + 4 * 32 * 64), rel=1e-5)
        assert row["speedup_over_dense"] == pytest.approx(found[0]["median_ms"] / row["median_ms"], rel=1e-4)


def test_generation_is_timed(root: Path) -> None:
    """A row for each width, number of tokens and provider; the dense layer's first, which the others are
    compared with.
    """
    sizes = ["--width", "64", "96", "--batch", "1", "5", "--kinds", "low_rank"]
    found = rows(root, "decode", "--device", "cpu", *sizes, "--repeats", "2")
    providers = ["torch", "ours"] if importlib.util.find_spec("sffn_kernels.decode") else ["torch"]
    layers = [(1.0, "dense"), *[(share, name) for share in SHARES["low_rank"] for name in providers]]
    want = [(width, tokens, *layer) for width in (64, 96) for tokens in (1, 5) for layer in layers]
    assert [(row["width"], row["tokens"], row["share"], row["provider"]) for row in found] == want
    for i, row in enumerate(found):
        dense = found[i - i % len(layers)]["median_ms"]
        assert (row["op"], row["mode"], row["layers"]) == ("decode", "forward", 64)
        assert row["speedup_over_dense"] == pytest.approx(dense / row["median_ms"], rel=1e-4)
        assert row["gflop"] == pytest.approx(2e-9 * row["tokens"] * matrices(row), rel=1e-5)


def test_a_run_that_does_not_fit_is_refused_before_it_is_timed(root: Path) -> None:
    done = bench(root, "guards", "--ranks", "3")
    assert done.returncode == 2
    assert "parallel.tensor = 2: must divide the number of ranks, 3" in done.stderr


@pytest.mark.parametrize("share", [32, 63])
@pytest.mark.parametrize("kind", KINDS)
def test_all_providers_compute_the_same_layer(
    root: Path, ranks: Callable[..., Any], kind: str, share: int
) -> None:
    """Output and all gradients, relative RMS, against the dense layer of what the factors stand for or
    against one another.
    """
    cases = root / "tests" / "tools_room" / "layer_cases.py"
    (found,) = ranks(1).run(cases, "errors", kind=kind, share=share, width=64, tokens=6)
    assert found.keys() >= {"bmm", "ours", "ours_bottleneck", "decode torch"}
    assert len(found["bmm"]) == 2 + 6  # y, x; two factors and the bias of each linear
    assert {name: error for name, error in found.items() if not max(error.values()) < 1e-5} == {}


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_no_layer_is_counted_cheaper_than_it_is(root: Path, ranks: Callable[..., Any], kind: str) -> None:
    """The FLOPs beside a time are those of the products that plain torch does."""
    cases = root / "tests" / "tools_room" / "layer_cases.py"
    (found,) = ranks(1).run(cases, "flops", kind=kind, width=64, tokens=6)
    for mode, (counted, said) in found.items():
        assert counted == said > 0, mode


@pytest.mark.parametrize("tokens", [1, 30000])
def test_the_least_time_is_that_of_the_slower_of_both_peaks(
    root: Path, ranks: Callable[..., Any], tokens: int
) -> None:
    """Width 2048 in bf16: of one token the memory's, of many the tensor cores'; a device that is not known
    has none.
    """
    peaks = {  # FLOP/s, bytes/s
        "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
        "NVIDIA H100 PCIe": (756e12, 2.0e12),
        "NVIDIA H200": (989e12, 4.8e12),
        "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
        "NVIDIA A100-PCIE-40GB": (312e12, 1.555e12),
    }
    cases = root / "tests" / "tools_room" / "layer_cases.py"
    (found,) = ranks(1).run(cases, "floors", width=2048, tokens=tokens, devices=[*peaks, "cpu, 2 cores"])
    flops, moved = 4 * tokens * 2048 * 8192, 2 * (2 * 2048 * 8192 + 8192 + 2048 + 2 * tokens * 2048)
    want = [1e3 * (moved / memory if tokens == 1 else flops / rate) for rate, memory in peaks.values()]
    assert found[:-1] == pytest.approx(want, rel=1e-5)
    assert found[-1] is None


@pytest.mark.skipif(machine.cuda() is not None, reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["ffn", "step", "decode"])
def test_cuda_without_a_device_is_refused(root: Path, command: str) -> None:
    done = bench(root, command, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cuda: there is no CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["comm", "--ranks", "3"], "--tokens = 8192: must be divisible by --ranks = 3"),
        (["comm", "--blocks", "5"], "--blocks = 5: must divide --width = 2048"),
        (["comm", "--ranks", "8", "--inner", "2056"], "--blocks = 4: its square must divide --inner = 2056"),
        (["comm", "--rank", "9000"], "--rank = 9000: must not exceed min(--width, --inner) = 2048"),
        (["tp", "--csv", "nowhere/rows.csv"], "--csv nowhere/rows.csv: there is no folder"),
        (["tp", "--repeats", "1"], "--repeats 1: must be at least 2"),
        (["tp", "--blocks", "1"], "--blocks 1: must be divisible by --ranks 2"),
        (["tp", "--ranks", "0"], "--ranks: 0 is not above 0"),
        (["tp", "--width", "wide"], "--width"),
        (["tp", "--tokens", "7"], "--tokens = 7: must be divisible by --ranks = 2"),
        (["tp", "--width", "2", "--blocks", "2"], "--blocks = 2: must divide --block-rank = 1"),
        (["guide", "--ranks", "2"], "unrecognized arguments: --ranks 2"),
        (["guide", "--repeats", "1"], "--repeats 1: must be at least 2"),
        (["guide", "--blocks", "3"], "--blocks = 3: must divide --width = 1024"),
        (["guide", "--block-rank", "6"], "--blocks = 4: must divide --block-rank = 6"),
        (["guide", "--rank", "1025"], "--rank = 1025: must not exceed min(--width, --inner) = 1024"),
        (["guide", "--tokens", "-1"], "--tokens: -1 is not above 0"),
        (["checkpoint", "--gigabytes", "0"], "--gigabytes 0: must be above 0 and not exceed 8.7"),
        (["checkpoint", "--gigabytes", "1e6"], "--gigabytes 1e+06: must be above 0 and not exceed 8.7"),
        (["checkpoint", "--gigabytes", "nan"], "--gigabytes nan: must be above 0"),
        (["checkpoint", "--folder", "nowhere"], "--folder nowhere: there is no such folder"),
        (
            ["checkpoint", "--folder", "/proc"],
            "--gigabytes 1.2: needs 3.61 GB, 0 GB free on the disk of --folder /proc",
        ),
        (["checkpoint", "--repeats", "1"], "--repeats 1: must be at least 2"),
        (["checkpoint", "--csv", "nowhere/rows.csv"], "--csv nowhere/rows.csv: there is no folder"),
        (["guide", "--csv", "nowhere/rows.csv"], "--csv nowhere/rows.csv: there is no folder"),
        (["ffn", "--csv", "nowhere/rows.csv"], "--csv nowhere/rows.csv: there is no folder"),
        (
            ["ffn", "--width", "64", "80"],
            "--width 80: must be divisible by 32 for block_dense with 32% of the parameters",
        ),
        (
            ["step", "--width", "72", "--shares", "63"],
            "--width 72: must be divisible by 16 for block_dense with 63%",
        ),
        (
            ["decode", "--widths", "66", "--kinds", "low_rank"],
            "--width 66: must be divisible by 4 for low_rank with 32%",
        ),
        (
            ["ffn", "--width", "7", "--shares", "63", "--kinds", "block_shuffle"],
            "--width 7: must be divisible by 2",
        ),
        (["ffn", "--shares", "50"], "--shares: invalid choice: 50"),
        (["ffn", "--kinds", "dense"], "--kinds: invalid choice: 'dense'"),
        (["ffn", "--tokens", "0"], "--tokens: 0 is not above 0"),
        (["decode", "--batch", "-1"], "--batch: -1 is not above 0"),
        (["decode", "--batch", "1", "65"], "--batch 65: must not exceed 64"),
        (["step", "--repeats", "1"], "--repeats 1: must be at least 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(root: Path, arguments: list[str], says: str) -> None:
    done = bench(root, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
