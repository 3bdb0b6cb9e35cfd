"""Real saves of a made-up state in processes that may be killed; called inside the nursery, which forks a
child for each.

The state's content is a function of its step, so that a checkpoint found later can be told right from wrong
without its writer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import math
import os
import pickle
import subprocess
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sffn_dist.checkpoint import manifest as manifests
from sffn_dist.checkpoint import run_folder, versions, writer
from sffn_dist.checkpoint.manifest import KINDS, Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.split_table import model_tensors
from sffn_dist.training import resume

torch.set_num_threads(1)  # no pool of threads that a forked child would lack
NEWUSER, NEWNS = 0x10000000, 0x00020000  # of unshare(2)
Outcome = tuple[bool, Any]
versions.revision(), versions.versions()  # known to every child


def config(width: int = 32, **checkpoint: Any) -> Config:
    """A state of 0.3 MB at width 32, of 3 MB at 128, of 30 MB at 512."""
    model = {"layers": 1, "width": width, "heads": 2, "sequence": 16, "vocab": 256}
    ffn = {"kind": "low_rank", "rank": width // 4, "width": 4 * width}
    guide = {"mode": "fixed_step", "fraction": 0.5}
    train = {"steps": 1000, "global_batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-3}
    return loading.from_tree(
        {"model": model, "ffn": ffn, "guide": guide, "train": train, "checkpoint": checkpoint}
    )


def place(rank: int = 0, world: int = 1) -> Topology:
    """One data-parallel rank of ``world``; no groups but the default one."""
    return Topology(rank, world, 1, 0, world, rank, torch.device("cpu"), None, None)


# ------------------------------------------------------------------------------------------------------ state


def content(step: int, name: str, kind: str, numel: int) -> Tensor:
    """What a tensor of the state holds at a step, exactly: whole numbers below 2^24."""
    return (
        torch.arange(numel, dtype=torch.float32) % 4096
        + zlib.crc32(f"{kind}/{name}".encode()) % 4096
        + 8192 * (step % 1000)
    )


class State:
    """This rank's part of the state: of every tensor the range that ZeRO would give it."""

    def __init__(self, settings: Config, here: Topology, guide: bool = False):
        self.fragments = []
        for name, spec in model_tensors(settings, guide=guide).items():
            start, stop = (spec.numel * rank // here.world_size for rank in (here.rank, here.rank + 1))
            tensors = {kind: torch.zeros(stop - start) for kind in KINDS}
            self.fragments.append(writer.Fragment(name, start, stop - start, tensors))
        self.numels = {name: spec.numel for name, spec in model_tensors(settings, guide=guide).items()}

    def become(self, step: int) -> None:
        """Take the content of ``step``, in place."""
        for fragment in self.fragments:
            for kind, tensor in fragment.tensors.items():
                whole = content(step, fragment.name, kind, self.numels[fragment.name])
                tensor.copy_(whole[fragment.start : fragment.start + fragment.numel])


def position(step: int, guide: bool = False) -> writer.Position:
    return writer.Position(step, step, step if guide else None, "data")


def save(saver: writer.Saver, state: State, step: int, guide: bool = False) -> Path | None:
    """Save the content of ``step``; the state is another one before the save is waited for."""
    state.become(step)
    saver.save(position(step, guide), state.fragments)
    state.become(999)
    return saver.wait()


def saver_in(run_dir: Path, settings: Config, here: Topology | None = None) -> writer.Saver:
    """A Saver with a small tokenizer file."""
    here = here or place()
    tokenizer = run_dir.parent / "tokenizer.json"
    if here.is_rank_zero and not tokenizer.exists():
        tokenizer.write_text('{"model": "none"}' + " " * 300)
    return writer.Saver(run_dir, settings, here, tokenizer)


def wrong_tensors(found: Manifest) -> list[str]:
    """Tensors of a checkpoint that are not those of its step, bit for bit; files that have not their hash."""
    reader = Reader(found)
    differ = []
    for name, spec in reader.specs.items():
        for kind in KINDS:
            expected = content(found.step, name, kind, math.prod(spec.shape)).view(spec.shape)
            if not torch.equal(reader.full(name, kind), expected):
                differ.append(f"{kind}/{name}")
    return differ + [str(problem) for problem in found.damage(found.files)]


# -------------------------------------------------------------------------------------------------- processes


def start(function: Callable[..., Any], *arguments: Any) -> tuple[int, int]:
    """A forked child that calls the function; its id, and the end of a pipe on which the pickled outcome
    comes.
    """
    reading_end, writing_end = os.pipe()
    child = os.fork()
    if child:
        os.close(writing_end)
        return child, reading_end
    try:
        outcome: Outcome = (True, function(*arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    with contextlib.suppress(BaseException), os.fdopen(writing_end, "wb") as pipe:
        pickle.dump(outcome, pipe)
    os._exit(0)


def answer(child: tuple[int, int]) -> Any:
    """What a child's function returned; None if it was killed."""
    with os.fdopen(child[1], "rb") as pipe:
        data = pipe.read()
    os.waitpid(child[0], 0)
    if not data:
        return None
    done, result = pickle.loads(data)
    assert done, result
    return result


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    return answer(start(function, *arguments))


def on_ranks(world: int, meeting: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(topology, ...)`` on gloo ranks that meet at a file, or here if it is one; what each
    returned.
    """
    meeting.unlink(missing_ok=True)
    if world == 1:
        return [function(place(), *arguments)]

    def one(rank: int) -> Any:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        return function(place(rank, world), *arguments)

    return [answer(child) for child in [start(one, rank) for rank in range(world)]]


def small_disk(folder: Path, size: str) -> str | None:
    """Give this process, a forked child, a tmpfs of its own at ``folder``; the reason where that is not
    allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEWNS) and libc.unshare(NEWNS | NEWUSER):
        return f"no mount namespace of one's own: {os.strerror(ctypes.get_errno())}"
    if os.getuid() != user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]):
        done = subprocess.run(["mount", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"mount {' '.join(command)}: {done.stderr.strip()}"
    return None


# ---------------------------------------------------------------------------------------------- what is found


def found(run_dir: Path, here: Topology | None = None) -> dict[str, Any]:
    """What a start makes of a run's folder: the step it takes, tensors that are wrong in it, the warnings,
    or the refusal.
    """
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sffn_dist").addHandler(handler)
    result: dict[str, Any] = {"step": None, "wrong": [], "refused": [], "warnings": warnings}
    try:
        newest = resume.latest_good_checkpoint(run_dir, here or place())
        if newest is not None:
            result |= {"step": newest.step, "wrong": wrong_tensors(newest)}
    except ConfigError as error:
        result["refused"] = error.problems
    finally:
        logging.getLogger("sffn_dist").removeHandler(handler)
    return {**result, "names": names(run_dir)}


def found_by_ranks(run_dir: Path, world: int) -> list[dict[str, Any]]:
    """What each rank of a start makes of it."""
    return on_ranks(world, run_dir.parent / "meeting", lambda here: found(run_dir, here))


def found_while_unreadable(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """What a start finds while the disk answers with errors for a file of the newest checkpoint, and
    after.
    """
    usual, newest = manifests.hash_file, run_folder.checkpoints(run_dir)[-1]

    def failing(path: Path) -> str:
        if path == newest / name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usual(path)

    manifests.hash_file = failing
    try:
        first = found(run_dir)
    finally:
        manifests.hash_file = usual
    return [first, found(run_dir)]


def names(run_dir: Path) -> list[str]:
    """All names in a run's folder of checkpoints, hidden ones too."""
    folder = run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def complete(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are whole, content and all."""
    whole = []
    for folder in run_folder.checkpoints(run_dir):
        with contextlib.suppress(manifests.BrokenCheckpoint):
            one = Manifest.read(folder)
            if not wrong_tensors(one):
                whole.append(one.step)
    return whole


def saved(
    run_dir: Path, steps: list[int], world: int = 1, guide: bool = False, **checkpoint: Any
) -> list[Any]:
    """Save these steps; by rank: names of what was saved, and the news."""

    def some(here: Topology) -> list[Any]:
        settings = config(**checkpoint)
        saver, state = saver_in(run_dir, settings, here), State(settings, here, guide)
        paths = [save(saver, state, step, guide) for step in steps]
        return [[path and path.name for path in paths], saver.pop_failures()]

    run_dir.mkdir(parents=True, exist_ok=True)
    return on_ranks(world, run_dir.parent / "meeting", some)


def saved_on_a_disk_that_goes(run_dir: Path, how: str) -> dict[str, Any]:
    """A save whose rank loses what it wrote, or whose folder is gone before it writes."""

    def attempt() -> dict[str, Any]:
        saver, write = saver_in(run_dir, config(asynchronous=False)), writer.Saver._write

        def lossy(self: writer.Saver, folder: Path, job: Any) -> Any:
            if how == "folder":
                folder.rmdir()
            report = write(self, folder, job)
            (folder / report[0]).unlink()
            return report

        writer.Saver._write = lossy  # type: ignore[method-assign]
        path = save(saver, State(saver.config, saver.topology), 1)
        return {"saved": path, "news": saver.pop_failures()}

    return forked(attempt)
