"""Saves that are killed, refused or run out of disk; called inside the nursery."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sffn_dist.checkpoint import run_folder, writer
from sffn_dist.parallel.topology import Topology

_spec = importlib.util.spec_from_file_location("saving_cases", Path(__file__).with_name("saving_cases.py"))
assert _spec
assert _spec.loader
saving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(saving)

CALLS = (
    "mkdir",
    "open",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
)  # all of os that a save changes the disk by, and syncs


# ---------------------------------------------------------------------------------- at one call of the system


def before_each_call(act: Callable[[str], None]) -> None:
    """From here on, in this process, ``act`` is told of each call before it is made."""

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calls(path: Any, *more: Any, **options: Any) -> Any:
            act(f"{name} {Path(path).name if not isinstance(path, int) else ''}")
            return call(path, *more, **options)

        return calls

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))


def save_with_calls(run_dir: Path, act: Callable[[int, str], None]) -> list[Any]:
    """Save step 3 of a run that has 1, 2 and a broken 3, of which 1 and 2 are to go; then once more,
    undisturbed.
    """
    settings = saving.config(keep=1)
    saver, state = saving.saver_in(run_dir, settings), saving.State(settings, saving.place())
    calls: list[str] = []
    watching = True

    def told(call: str) -> None:
        if watching:
            calls.append(call)
            act(len(calls) - 1, call)

    before_each_call(told)
    path = saving.save(saver, state, 3)
    watching = False
    news, left, whole = saver.pop_failures(), saving.names(run_dir), saving.complete(run_dir)
    again = saving.save(saver, state, 3)
    return [calls, path and path.name, news, left, whole, again and again.name, saver.pop_failures()]


def prepared(folder: Path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3, the last one broken."""
    run = folder / "run"
    saving.saved(run, [1, 2, 3], keep=3)
    (run / "checkpoints" / "step_00000003" / "rank_00000.safetensors").write_bytes(b"torn")
    return run


def every_call(folder: Path, fault: str) -> list[dict[str, Any]]:
    """Save once for each call that a save makes, and let the fault (kill, error) happen there; what was
    left each time.
    """
    template = prepared(folder)

    def fresh(name: str) -> Path:
        shutil.copytree(template, folder / name)
        return folder / name

    calls = saving.forked(save_with_calls, fresh("none"), lambda *_: None)[0]
    outcomes = []
    for index, call in enumerate(calls):

        def act(at: int, _: str, index: int = index) -> None:
            if at == index and fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif at == index:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        run = fresh(f"call_{index}")
        result = saving.forked(save_with_calls, run, act)
        row = {"call": f"{index} {call}", "result": result and result[1:]}
        if fault == "kill":
            row |= after_kill(run)
        outcomes.append(row)
        shutil.rmtree(run)
    return outcomes


def after_kill(run: Path) -> dict[str, Any]:
    """What the next start finds and leaves, and whether a new process goes on from there."""
    found = saving.found(run)
    run_folder.remove_leftovers(run)
    swept = saving.names(run)
    later = saving.saved(run, [found["step"] + 1], keep=2)[0]
    return {**found, "swept": swept, "later": later, "then": saving.found(run)["step"]}


def stolen_name(run_dir: Path) -> list[str]:
    """Killed between the two renames where what bore the name is of another version: after the sweep it
    bears it again.
    """
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / ".step_00000003.older.partial").mkdir()
    (checkpoints / ".step_00000003.older.partial" / "manifest.json").write_text(
        '{"format": "sffn_dist checkpoint", "version": 9}'
    )
    (checkpoints / ".step_00000002.older.partial").write_text("a file")
    (checkpoints / "step_00000002").mkdir()
    run_folder.remove_leftovers(run_dir)
    return saving.names(run_dir)


# ------------------------------------------------------------------------------------------ at random moments


def _save_for_ever(here: Topology, run_dir: Path, first: int, width: int, report: int) -> None:
    settings = saving.config(width, keep=2)
    saver, state = saving.saver_in(run_dir, settings, here), saving.State(settings, here)
    if here.is_rank_zero:
        os.write(report, b"ready\n")
    for step in range(first, first + 900):
        if saving.save(saver, state, step) and here.is_rank_zero:
            os.write(report, f"{step}\n".encode())
        for problem in saver.pop_failures() if here.is_rank_zero else ():
            os.write(report, f"{problem}\n".encode())


def killed_at_random(
    run_dir: Path, kills: int, seed: int, world: int, width: int, longest: float
) -> list[dict[str, Any]]:
    """Kill a run ``kills`` times while it saves one step after another, each time going on from the newest
    checkpoint.
    """
    rng, before, rows = random.Random(seed), 0, []
    run_dir.mkdir(parents=True)
    for _ in range(kills):
        reading_end, report = os.pipe()
        meeting = run_dir.parent / "meeting"
        meeting.unlink(missing_ok=True)

        def one(rank: int, meeting: Path = meeting, before: int = before, report: int = report) -> None:
            if world > 1:
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
            _save_for_ever(saving.place(rank, world), run_dir, before + 1, width, report)

        children = [saving.start(one, rank) for rank in range(world)]
        os.close(report)
        with os.fdopen(reading_end, "rb") as lines:
            assert lines.readline() == b"ready\n"
            waited = rng.random() < 0.7
            said = [lines.readline().decode().strip()] if waited else []
            time.sleep(rng.uniform(0.0, longest))
            for child, _ in sorted(children, key=lambda _: rng.random()):
                os.kill(child, signal.SIGKILL)
            for child in children:
                saving.answer(child)
            said += lines.read().decode().splitlines()
        reported = int(said[-1]) if said and said[-1].isdecimal() else before
        found = saving.found(run_dir) if saving.names(run_dir) else {"step": None, "wrong": []}
        left = saving.names(run_dir)
        run_folder.remove_leftovers(run_dir)
        rows.append(
            {
                **found,
                "waited": waited,
                "before": before,
                "reported": reported,
                "said": said,
                "left": left,
                "swept": saving.names(run_dir),
            }
        )
        before = found["step"] or 0
    return rows


# ------------------------------------------------------------------------------------- slow and failing ranks


def slow_saves(run_dir: Path) -> list[Any]:
    """What happens in which order when two saves follow one another onto a disk that is slow."""

    def both() -> list[Any]:
        events: list[str] = []

        class Slow(writer.TensorFile):
            def __init__(self, path: Path, entries: Any):
                time.sleep(0.2)
                events.append("writing")
                super().__init__(path, entries)

            def close(self) -> tuple[int, str]:
                events.append("written")
                return super().close()

        writer.TensorFile = Slow  # type: ignore[misc]
        settings = saving.config()
        saver, state = saving.saver_in(run_dir, settings), saving.State(settings, saving.place())
        for step in (1, 2):
            state.become(step)
            saver.save(saving.position(step), state.fragments)
            events.append(f"returned {step}")
            state.become(999)
        saver.wait()
        return [[*events, "waited"], saving.complete(run_dir)]

    run_dir.mkdir(parents=True)
    return saving.forked(both)


def one_rank_fails(run_dir: Path, where: str) -> list[Any]:
    """Two ranks, of which the last fails once: by rank what was saved, the news, and what it sees then."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("no luck")

    def some(here: Topology) -> list[Any]:
        settings = saving.config()
        saver, state = saving.saver_in(run_dir, settings, here), saving.State(settings, here)
        part, method = (saver._staging, "copy") if where == "staging" else (saver, "_write")
        paths = [saving.save(saver, state, 1)]
        if here.rank == 1:
            setattr(part, method, fail)
        paths.append(saving.save(saver, state, 2))
        seen = saving.names(run_dir)
        dist.barrier()
        if here.rank == 1:
            delattr(part, method)
        paths.append(saving.save(saver, state, 2))
        return [[path and path.name for path in paths], saver.pop_failures(), seen]

    run_dir.mkdir(parents=True)
    return saving.on_ranks(2, run_dir.parent / "meeting", some)
