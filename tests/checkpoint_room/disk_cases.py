"""Saves onto disks that fill, are full, or take nothing; called inside the nursery."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sffn_dist.checkpoint import writer
from sffn_dist.parallel.topology import Topology

_spec = importlib.util.spec_from_file_location("saving_cases", Path(__file__).with_name("saving_cases.py"))
assert _spec
assert _spec.loader
saving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(saving)


def fill(file: Path, leave: int) -> None:
    """Take the disk's room but for some bytes."""
    with file.open("wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(1 << 16))
        filler.truncate(max(0, filler.tell() - leave))


@contextlib.contextmanager
def obstacle(kind: str, disk: Path, here: Topology, half: int) -> Iterator[None]:
    """What stands in a save's way: a disk that is full before or during it, a limit on the last rank's
    files, a read-only disk.
    """
    limits, check = resource.getrlimit(resource.RLIMIT_FSIZE), writer.check_room
    if kind in ("full", "vanishing") and here.is_rank_zero:
        fill(disk / "filler", half)
    if kind == "vanishing":
        writer.check_room = lambda *_: None
    if kind == "limit" and here.rank == here.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (half // here.world_size, limits[1]))
    if kind == "read-only" and here.is_rank_zero:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    _meet(here)
    yield
    _meet(here)
    writer.check_room = check
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if kind == "read-only" and here.is_rank_zero:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    if here.is_rank_zero:
        (disk / "filler").unlink(missing_ok=True)
    _meet(here)


def _meet(here: Topology) -> None:
    if here.world_size > 1:
        dist.barrier()


def obstructed(here: Topology, disk: Path, kind: str, asynchronous: bool) -> dict[str, Any]:
    """Save step 1; step 2 against an obstacle; step 2 again without."""
    settings, run_dir = saving.config(asynchronous=asynchronous), disk / "run"
    saver, state = saving.saver_in(run_dir, settings, here), saving.State(settings, here)
    half = 12 * sum(state.numels.values()) // 2
    paths = [saving.save(saver, state, 1)]
    with obstacle(kind, disk, here, half):
        paths.append(saving.save(saver, state, 2))
        news, left, whole = saver.pop_failures(), saving.names(run_dir), saving.complete(run_dir)
    paths.append(saving.save(saver, state, 2))
    _meet(here)
    saves = [path and path.name for path in paths]
    return {
        "saves": saves,
        "news": news,
        "left": left,
        "whole": whole,
        "later": saver.pop_failures(),
        "then": saving.complete(run_dir),
    }


def obstructed_ranks(
    folder: Path, kind: str, world: int, size: str | None, asynchronous: bool = True
) -> list[Any] | str:
    """``obstructed`` on each rank, on a tmpfs of that size if one is given; the reason where there can be
    none.
    """

    def on_the_disk() -> list[Any] | str:
        reason = saving.small_disk(folder, size) if size else None
        return reason or saving.on_ranks(world, folder / "meeting", obstructed, folder, kind, asynchronous)

    return saving.forked(on_the_disk)


def damaged_on_a_read_only_disk(folder: Path) -> dict[str, Any] | str:
    """What a start makes of a damaged checkpoint that it cannot mark."""

    def on_the_disk() -> dict[str, Any] | str:
        reason = saving.small_disk(folder, "16m")
        if reason:
            return reason
        saving.saved(folder / "run", [1, 2])
        shard = folder / "run" / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        return saving.found(folder / "run")

    return saving.forked(on_the_disk)


def filled_at_random(folder: Path, times: int, seed: int) -> list[dict[str, Any]] | str:
    """Save on a small disk that another process fills at a random moment of every save, and frees again."""

    def on_the_disk() -> list[dict[str, Any]] | str:
        reason = saving.small_disk(folder, "28m")  # room for three of 4.7 MB and some
        if reason:
            return reason
        rng, rows, settings = random.Random(seed), [], saving.config(128, keep=2)
        saver, state = saving.saver_in(folder / "run", settings), saving.State(settings, saving.place())
        for step in range(1, times + 1):
            whole = saving.complete(folder / "run") if step > 1 else []

            def take_room(delay: float = rng.uniform(0.0, 0.03)) -> None:
                time.sleep(delay)
                fill(folder / "filler", 1 << 16)

            filler = saving.start(take_room)
            path = saving.save(saver, state, step)
            saving.answer(filler)
            news, left, after = (
                saver.pop_failures(),
                saving.names(folder / "run"),
                saving.complete(folder / "run"),
            )
            (folder / "filler").unlink(missing_ok=True)
            rows.append(
                {
                    "step": step,
                    "saved": bool(path),
                    "news": news,
                    "left": left,
                    "before": whole,
                    "after": after,
                }
            )
        return rows

    return saving.forked(on_the_disk)
