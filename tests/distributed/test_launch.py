"""The product as a person starts it: the deepspeed launcher, real ranks, a kill, a restart, refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.launch.ports import free_port

STEPS = 12  # guided 0, 1; plain 2 .. 9; 10, 11 repeat the guided ones
SCRIPT = "sffn_dist/pretrain.py"


def settings(folder: Path) -> dict[str, Any]:
    return {
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "sequence": 32, "vocab": 512},
        "ffn": {"kind": "block_dense", "width": 128, "rank": 16, "blocks": 4, "dense_layers": []},
        "guide": {"mode": "fixed_flop", "stochastic": True},
        "data": {"dir": str(folder / "data"), "source": str(folder / "text"), "heldout_share": 0.2},
        "train": {"steps": STEPS - 2, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        "parallel": {"tensor": 2, "sequence": True},
        "precision": "fp32",
        "checkpoint": {"interval": 3},
        "evaluation": {"interval": 5, "sequences": 6},
        "sample": {"tokens": 5},
        "logging": {"tensorboard": True},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file and some real text."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "text").mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "bisect", "calendar", "cmd", "copy", "csv", "datetime", "enum", "glob"):
        (folder / "text" / f"{name}.txt").write_text(
            (stdlib / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8"
        )
    (folder / "tiny.json").write_text(json.dumps(settings(folder)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, str]:
    """run.dir and printed page of an uninterrupted run."""
    run = folder / "whole"
    code, out, err = finish(start(Path(__file__).resolve().parents[2], folder, f"run.dir={run}"))
    assert code == 0, err
    return run, out


def start(root: Path, folder: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
    port = free_port()
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [str(launcher), "--num_gpus", str(ranks), "--master_port", str(port), SCRIPT]
    command += ["--config", str(folder / "tiny.json"), *overrides]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"PYTHONSAFEPATH": "1", "PATH": f"{launcher.parent}:{environment['PATH']}"}
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def curve(run: Path) -> list[tuple[Any, ...]]:
    return [
        tuple(row[key] for key in ("step", "tokens", "loss", "alpha", "lr", "grad_norm")) for row in rows(run)
    ]


def ranks_alive(run: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(SCRIPT.encode()) for word in words[:4]) and f"run.dir={run}".encode() in words:
            found.append(int(entry.parent.name))
    return found


def test_what_a_run_writes(whole: tuple[Path, str]) -> None:
    run, out = whole
    assert [row["step"] for row in rows(run)] == list(range(STEPS))
    assert [row["phase"] for row in rows(run)] == ["guided"] * 2 + ["plain"] * 8 + ["repeat"] * 2
    assert [row["data_step"] for row in rows(run)] == [*range(10), 0, 1]
    assert [row["alpha"] for row in rows(run)] == [1.0, pytest.approx(0.5)] + [0.0] * 10
    assert rows(run)[0]["guided_share"] == 1.0
    assert all(0.0 < row["data_wait_ms"] < 1000.0 * row["seconds"] for row in rows(run))
    assert all(row["guided_share"] == 0.0 for row in rows(run)[2:])
    newest = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text())
    assert not any(name.endswith(".guide") for name in newest["tensors"]), "nothing is left of the guide"
    summary = json.loads((run / "summary.json").read_text())
    wanted = {
        "epochs",
        "heldout_loss",
        "unigram_entropy",
        "perplexity",
        "bits_per_byte",
        "bits_per_byte_estimated",
        "tokens_per_s",
        "seconds",
        "steps",
    }
    assert wanted <= summary.keys()
    assert f"{summary['heldout_loss']:.4f}" in out
    assert f"{summary['unigram_entropy']:.4f}" in out
    assert {"step", "tokens", "loss", "alpha", "lr", "grad_norm", "tokens_per_s"} <= rows(run)[0].keys()
    assert (run / "tensorboard").is_dir()


def test_killed_and_restarted_equals_uninterrupted(root: Path, folder: Path, whole: tuple[Path, str]) -> None:
    broken = folder / "broken"
    stop_at = random.randint(1, STEPS - 2)
    victim = start(root, folder, f"run.dir={broken}")
    deadline = time.monotonic() + 240
    while len(rows(broken)) < stop_at:
        assert victim.poll() is None, finish(victim)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rival = start(root, folder, f"run.dir={broken}")
    code, _, err = finish(rival)
    if len(ranks_alive(broken)) >= 2:  # the run may have ended in the meantime
        assert code == 2
        assert err.count("pretrain.py: error: run.dir") == 1, "one message from one rank"
    # the launcher goes; its ranks must follow by themselves
    os.kill(victim.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while ranks_alive(broken):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.2)
    victim.communicate()
    code, _, err = finish(start(root, folder, f"run.dir={broken}"))
    assert code == 0, err
    assert curve(broken) == curve(whole[0]), f"stopped after {stop_at} steps"


def test_refused_through_the_launcher(root: Path, folder: Path) -> None:
    wrong = ("ffn.rank=18", "train.micro_batch_size=3")
    code, _, err = finish(start(root, folder, f"run.dir={folder / 'refused'}", *wrong))
    assert code == 2
    lines = [line for line in err.splitlines() if "pretrain.py: error" in line]
    assert len(lines) == len(set(lines)) == 2, "one rank speaks"
    assert any("ffn.rank = 18" in line and "ffn.blocks" in line for line in lines)
    assert any("train.micro_batch_size = 3: must divide" in line for line in lines)
    assert not (folder / "refused").exists()


def test_another_run_in_run_dir_is_refused(root: Path, folder: Path, whole: tuple[Path, str]) -> None:
    """Another seed is refused, another layout goes on (and finds the run complete)."""
    run, _ = whole
    before = {path: path.read_bytes() for path in run.glob("*.json*")}

    def alone(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            SCRIPT,
            "--config",
            str(folder / "tiny.json"),
            f"run.dir={run}",
            *overrides,
        ]
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)

    for override in (
        "train.seed=5",
        "model.layers=3",
        "guide.schedule=linear",
    ):
        result = alone("parallel.tensor=1", override)
        assert result.returncode == 2, result.stderr
        assert override.split("=")[0] in result.stderr
    assert before == {path: path.read_bytes() for path in run.glob("*.json*")}, "a refusal changes nothing"
    again = alone("parallel.tensor=1", "zero.stage=3", "train.micro_batch_size=1", "recompute=full")
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in rows(run)] == list(range(STEPS))
