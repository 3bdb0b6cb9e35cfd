"""Real runs that are changed on the way; called inside the nursery, which forks them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from sffn_dist import pretrain
from sffn_dist.launch.ports import free_port

SETTINGS = [
    "checkpoint.interval=2",
    "checkpoint.keep=20",
    "logging.progress=false",
    "guards.preflight=false",
    "sample.tokens=2",
]


def start(folder: Path, name: str, *words: str, world: int = 1) -> dict[str, Any]:
    """Start the run ``name`` in a process a rank: codes, what it printed, and what it left."""
    run, log = folder / name, folder / f"{name}.log"
    argv = ["--config", str(folder / "tiny.json"), f"run.dir={run}", *SETTINGS, *words]
    log.unlink(missing_ok=True)
    port = free_port()
    pids = [_fork(argv, rank, world, port, log) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    rows = _rows(run / "metrics.jsonl")
    return {
        "codes": codes,
        "code": max(codes),
        "log": log.read_text(),
        "rows": rows,
        "curve": [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows],
        "record": json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else None,
        "events": [row["event"] for row in _rows(run / "events.jsonl")],
        "saved": sorted(int(path.name[5:]) for path in run.glob("checkpoints/step_*")),
    }


def _fork(argv: list[str], rank: int, world: int, port: int, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in {**place, "MASTER_PORT": port}.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        pretrain.cli.launcher_watch.watch_launcher = lambda *_: None  # type: ignore[assignment]
        code = pretrain.main(argv)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_config(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "other").mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "calendar", "cmd", "copy", "csv", "datetime", "enum"):
        for place in ("text", "other"):
            text = (stdlib / f"{name}.py").read_text(encoding="utf-8")
            (folder / place / f"{name}.txt").write_text(
                text if place == "text" else text[::-1], encoding="utf-8"
            )
    tree = {
        "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 32, "vocab": 512},
        "ffn": {"kind": "low_rank", "width": 128, "rank": 16, "dense_layers": []},
        "guide": {"mode": "fixed_step", "fraction": 0.5},
        "data": {"dir": str(folder / "data"), "source": str(folder / "text"), "heldout_share": 0.2},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 3e-3},
        "precision": "fp32",
        "evaluation": {"sequences": 4},
    }
    (folder / "tiny.json").write_text(json.dumps(tree), encoding="utf-8")


def runs(folder: str) -> dict[str, Any]:
    """All that the tests ask about."""
    place, out = Path(folder), {}
    write_config(place)
    change = ["--change", "train.steps=14 train.learning_rate=1e-3"]
    out["plain"] = start(place, "plain")
    start(place, "once", "train.stop_at_step=6")
    shutil.copytree(place / "once", place / "twice")
    out["once"] = start(place, "once", *change, world=2)
    out["short stop"] = start(place, "twice", *change, "train.stop_at_step=9", "guards.stop_seconds=1")["log"]
    out["twice"] = start(place, "twice", *change, "parallel.tensor=2", world=2)
    refused = start(place, "once")
    out["refused"] = refused["code"], refused["log"]
    out["in the config"] = start(place, "once", "train.steps=14", "train.learning_rate=1e-3")["code"]

    for number, (name, words) in enumerate(
        {
            "copied": [],
            "copied, other model.rope_base": ["model.rope_base=5000"],
            "copied, other train.learning_rate": ["train.learning_rate=1e-2"],
            "copied, other guide.mode": ["guide.mode=off"],
            "copied, other data": [f"data.source={place / 'other'}"],
            "copied, fewer steps": ["train.steps=4"],
        }.items()
    ):
        shutil.copytree(place / "plain/checkpoints", place / f"copy{number}/checkpoints")
        copied = start(place, f"copy{number}", *words)
        out[name] = copied["code"], copied["log"]

    out["stopped at step"] = start(place, "stops", "train.stop_at_step=3")
    out["stopped and gone on"] = start(place, "stops")["curve"]
    out["stopped minutes"] = start(place, "minutes", "train.stop_after_minutes=0.000001")

    constant = ["guide.mode=off", "train.warmup_share=0", "train.learning_rate_schedule=constant"]
    out["constant"] = start(place, "constant", *constant)
    source = place / "constant/checkpoints/step_00000004"
    second = [*constant, "train.steps=4", f"init_from={source}"]
    state = ["init_from.optimizer=true", "init_from.data=true"]
    out["second stage"] = [row[1:] for row in start(place, "second", *second, *state)["curve"]]
    out["weights alone"] = [row[1:] for row in start(place, "alone", *second)["curve"]]
    other = start(place, "seed", *second, *state, "train.seed=7")
    out["other seed"] = other["code"], other["log"]
    shutil.copytree(place / "constant", place / "moved")
    for name, step in (("weights moved", 4), ("other weights", 2)):
        path = place / f"moved/checkpoints/step_{step:08d}"
        again = start(place, "second", *constant, "train.steps=4", f"init_from={path}", *state)
        out[name] = again["code"], again["log"]
    return out
