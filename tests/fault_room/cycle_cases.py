"""A short run killed and started again, many times; called inside the nursery, whose children have all
imports behind them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sffn_dist import model as models
from sffn_dist import pretrain
from sffn_dist.checkpoint import writer
from sffn_dist.checkpoint.run_folder import latest_checkpoint
from sffn_dist.inference import evaluation
from sffn_dist.launch.ports import free_port
from sffn_dist.parallel import rendezvous
from sffn_dist.telemetry import trackers
from sffn_dist.training import step
from sffn_dist.training.hooks import evaluate


def start(argv: list[str], world: int, log: Path) -> list[int]:
    """Fork the ranks of a run; their pids by rank."""
    port = free_port()
    return [_fork(argv, rank, world, port, log) for rank in range(world)]


def _fork(argv: list[str], rank: int, world: int, port: int, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_PORT": port,
        }
        os.environ.update({**{key: str(value) for key, value in place.items()}, "MASTER_ADDR": "127.0.0.1"})
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        pretrain.cli.launcher_watch.watch_launcher = lambda *_: None  # the nursery is no launcher
        # a rank may be killed before the others have met it, where a launcher would end those
        rendezvous.connect = functools.partial(rendezvous.connect, patience=15.0)  # type: ignore[assignment]
        code = pretrain.main(argv)
    finally:
        os._exit(code)


def rows(run: Path) -> int:
    """How many steps the run has told of."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def cycles(argv: list[str], run: str, kills: int, seed: int, world: int) -> list[dict[str, Any]]:
    """Kill some rank of the run after some more steps, or while it starts; again and again, then let it
    end.
    """
    chance, told, folder = random.Random(seed), [], Path(run)
    log = folder.with_name(folder.name + ".log")
    for number in range(kills + 1):
        pids, before = start(argv, world, log), rows(folder)
        alive, wanted = dict(enumerate(pids)), before + chance.randrange(1, 12)
        deadline = time.monotonic() + (chance.uniform(0.0, 2.0) if chance.random() < 0.2 else 90.0)
        codes: dict[int, int] = {}
        killed = None
        while alive:
            for rank, pid in list(alive.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    del alive[rank]
            if (
                killed is None
                and alive
                and number < kills
                and (rows(folder) >= wanted or time.monotonic() > deadline)
            ):
                time.sleep(chance.uniform(0.0, 0.05))
                killed = chance.choice(list(alive))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(alive[killed], signal.SIGKILL)
            time.sleep(0.005)
        told.append(
            {
                "killed": killed,
                "codes": [codes[rank] for rank in range(world)],
                "from": before,
                "to": rows(folder),
            }
        )
    return told


def signalled(
    argv: list[str], run: str, world: int, number: int, rank: int, *, again: bool = False
) -> list[int]:
    """Send a signal to one rank after some steps; with ``again`` others to all ranks while the state is
    saved. Exit codes.
    """
    folder, slow = Path(run), _slow_writes() if again else contextlib.nullcontext()
    before = rows(folder)
    with slow:
        pids = start(argv, world, folder.with_name(folder.name + ".log"))
    while rows(folder) < before + 4:
        time.sleep(0.01)
    os.kill(pids[rank], number)
    if again:
        while not list(folder.glob("checkpoints/.step_*.partial/*")):
            time.sleep(0.01)
        for other in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            for pid in pids:
                os.kill(pid, other)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def stuck(argv: list[str], run: str, doing: str, record: str) -> tuple[list[int], float]:
    """SIGTERM to both ranks of a run while it evaluates, samples, or waits for a rank that never comes.
    Exit codes, and how long they took to end.
    """
    folder = Path(run)
    usual, mark = (models.token_logits, step.agree_on_step, step.reporting.report_step), folder / "mark"
    usual_finish = trackers.Trackers.finish

    def wait(*_: Any, **__: Any) -> Any:
        mark.touch()
        time.sleep(60.0)

    def slow_finish(self: Any, summary: Any) -> None:
        """Rank 0 ends last: its main thread sees the other rank's connection close meanwhile."""
        if os.environ["RANK"] == "0":
            time.sleep(1.5)
        usual_finish(self, summary)

    def lost(function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if os.environ["RANK"] == "1" and rows(folder) >= 2:
                wait()
            return function(*args, **more)

        return call

    if doing == "evaluation":
        evaluate.evaluate = wait
    elif doing == "sample":
        models.token_logits = wait
    elif doing == "collective":
        step.agree_on_step = lost(usual[1])
        trackers.Trackers.finish = slow_finish  # type: ignore[method-assign]
    else:
        step.reporting.report_step = lost(usual[2])
    os.environ["SFFN_EXIT_FILE"] = record
    pids = start(argv, 2, folder.with_name(folder.name + ".log"))
    del os.environ["SFFN_EXIT_FILE"]
    models.token_logits, step.agree_on_step, step.reporting.report_step = usual
    evaluate.evaluate = evaluation.evaluate
    trackers.Trackers.finish = usual_finish  # type: ignore[method-assign]
    while not mark.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, time.monotonic() - began


@contextlib.contextmanager
def _slow_writes() -> Iterator[None]:
    """Ranks forked inside take a second to write a checkpoint."""
    usual = writer.Saver._write

    def write(saver: Any, folder: Path, job: Any) -> Any:
        result = usual(saver, folder, job)
        time.sleep(1.0)
        return result

    writer.Saver._write = write  # type: ignore[method-assign]
    yield
    writer.Saver._write = usual  # type: ignore[method-assign]


def outcome(run: str) -> dict[str, Any]:
    """The last checkpoint's step and the hashes of its files; the curve."""
    manifest = latest_checkpoint(Path(run))
    assert manifest
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    curve = [tuple(json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")) for line in lines]
    return {
        "step": manifest.step,
        "files": {name: file.sha256 for name, file in manifest.files.items()},
        "curve": curve,
    }
