"""Real runs by the deepspeed launcher, some with a fault, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sffn_dist.launch.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
FAULTY = Path(__file__).with_name("faulty.py")


def write_config(folder: Path, **over: Any) -> Path:
    """A tiny model on real text, in fp32: losses to the last digit."""
    (folder / "text").mkdir(exist_ok=True)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "bisect", "calendar", "cmd", "copy", "csv", "datetime", "enum", "glob"):
        (folder / "text" / f"{name}.txt").write_text(
            (stdlib / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8"
        )
    tree = {
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "sequence": 32, "vocab": 512},
        "ffn": {"kind": "block_dense", "width": 128, "rank": 16, "blocks": 4, "dense_layers": []},
        "guide": {"mode": "fixed_step", "fraction": 0.2, "stochastic": True},
        "data": {"dir": str(folder / "data"), "source": str(folder / "text"), "heldout_share": 0.2},
        "train": {"steps": 60, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 3e-3},
        "precision": "fp32",
        "checkpoint": {"interval": 10},
        "evaluation": {"sequences": 4},
        "sample": {"tokens": 4},
        "guards": {"spike_window": 16},
        **over,
    }
    path = folder / "tiny.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@dataclass
class Launch:
    """One start of a run."""

    run: Path
    process: subprocess.Popen[str]
    mark: Path
    log: Path
    ended: float = 0.0
    code: int = 0
    output: str = field(default="", repr=False)

    def wait(self, timeout: float = 240.0) -> Launch:
        """Until the launcher has ended, and every rank."""
        try:
            self.code = self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        while ranks(self.run) and timeout > 0:
            time.sleep(0.1)
            timeout -= 0.1
        self.ended = time.time()
        self.output = self.log.read_text(encoding="utf-8", errors="replace")
        return self

    def until_step(self, step: int, timeout: float = 120.0) -> None:
        """Until the run has told of so many steps."""
        deadline = time.monotonic() + timeout
        while len(rows(self.run / "metrics.jsonl")) < step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def stop(self, number: str, times: int) -> float:
        """Signal it as a terminal does (SIGINT, to launcher and ranks) or the launcher alone (SIGTERM), and
        wait until none of its processes is left: the seconds that this took.
        """
        began = time.monotonic()
        for _ in range(times):
            if number == "SIGINT":
                os.killpg(self.process.pid, signal.SIGINT)
            else:
                self.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        self.process.wait(30.0)
        while running(self.run):
            assert time.monotonic() < began + 30.0, self.log.read_text()
            time.sleep(0.1)
        return time.monotonic() - began

    def messages(self, start: str = "pretrain.py: error: ") -> list[str]:
        """Lines of the output that begin so."""
        return [line.removeprefix(start) for line in self.output.splitlines() if line.startswith(start)]


def launch(
    config: Path,
    run: Path,
    *overrides: str,
    world: int = 2,
    fault: dict[str, Any] | None = None,
    port: int = 0,
    launcher: str = "deepspeed",
) -> Launch:
    """Start a run in ``run``; its own session, so that all of it can be ended.

    ``launcher``: deepspeed, torchrun, or none, for a bare process.
    """
    if not port:
        port = free_port()
    scripts = Path(sys.executable).parent
    script = str(FAULTY if fault else ROOT / "sffn_dist" / "pretrain.py")
    command = {
        "deepspeed": [str(scripts / "deepspeed"), "--num_gpus", str(world), "--master_port", str(port)],
        "torchrun": [str(scripts / "torchrun"), "--nproc-per-node", str(world), "--master-port", str(port)],
        "none": [sys.executable],
    }[launcher]
    command += [script, "--config", str(config)]
    mark, log = run.with_name(run.name + ".mark"), run.with_name(run.name + ".log")
    mark.unlink(missing_ok=True)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {
        "PYTHONSAFEPATH": "1",
        "PATH": f"{scripts}:{environment['PATH']}",
        "FAULT_MARK": str(mark),
        "SFFN_EXIT_FILE": str(run.with_name(run.name + ".end.json")),
    }
    environment |= {"FAULT": json.dumps(fault or {}), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, f"run.dir={run}", *overrides],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    return Launch(run, process, mark, log)


def running(run: Path) -> list[int]:
    """Processes of the run: launchers, ranks and what they started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"run.dir={run}".encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def ranks(run: Path) -> dict[int, int]:
    """Rank -> pid of the run's living ranks on this machine."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((word for word in words if word.startswith(b"--local_rank=")), None)
        if rank and f"run.dir={run}".encode() in words and b"python" in words[0]:
            found[int(rank.partition(b"=")[2])] = int(entry.parent.name)
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a log."""
    try:
        return [
            json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")
        ]
    except FileNotFoundError:
        return []


def saved(run: Path) -> list[int]:
    """Steps of the run's complete checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/manifest.json"))
