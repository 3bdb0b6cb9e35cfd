"""A run's folder of checkpoints: names, the newest complete one, what is kept. Standard library only."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Container
from pathlib import Path

from sffn_dist.atomic_io import sync
from sffn_dist.checkpoint.manifest import NAME, BrokenCheckpoint, Manifest, UnreadableCheckpoint
from sffn_dist.spec.config import ConfigError

log = logging.getLogger(__name__)


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, oldest first.

    Raises OSError where they cannot be listed (a glob would find none).
    """
    try:
        names = os.listdir(run_dir / "checkpoints")
    except FileNotFoundError:
        return []
    steps = {
        name: name.removeprefix("step_") for name in names if name.startswith("step_") and name.isascii()
    }
    sorted_names = sorted(
        (name for name, step in steps.items() if step.isdecimal()), key=lambda name: int(steps[name])
    )
    return [run_dir / "checkpoints" / name for name in sorted_names]


def latest_checkpoint(
    run_dir: Path, known_damaged: Container[Path] = (), up_to: int | None = None
) -> Manifest | None:
    """The newest complete checkpoint of a run; broken ones are skipped and named in a warning.

    Content is not read: see ``damage``.

    ``up_to``: the last step that it may be of.

    None if there is none, or none up to ``up_to``. Raises ConfigError if there are some and all are broken
    (or among ``known_damaged``), or if they cannot be listed: starting anew would overwrite the run.
    """
    reasons: list[str] = []
    already_logged = 0
    try:
        folders = checkpoints(run_dir)
    except OSError as error:
        raise ConfigError(
            [f"run.dir = {str(run_dir)!r}: its checkpoints cannot be listed: {error}"]
        ) from None
    for folder in reversed(folders):
        if up_to is not None and step_of(folder) > up_to:
            continue
        if folder in known_damaged:
            reasons.append(f"{folder}: its content is damaged, see above")
            already_logged = len(reasons)  # those before it by the call that found it
            continue
        try:
            manifest = Manifest.read(folder)
        except BrokenCheckpoint as error:
            reasons.append(str(error))
            continue
        for reason in reasons[already_logged:]:
            log.warning("checkpoint skipped: %s", reason)
        return manifest
    if reasons:
        raise ConfigError(
            [
                f"run.dir = {str(run_dir)!r}: no checkpoint in it is complete; restore one, "
                f"or use another run.dir: {reason}"
                for reason in reasons
            ]
        )
    return None


def find_checkpoint(key: str, path: str) -> Manifest:
    """The checkpoint that ``path`` (a checkpoint, or a run whose newest is meant) names.

    Raises ConfigError naming ``key``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError([f"{key} = {path!r}: no such folder; must be a checkpoint or a run.dir"])
    if (folder / NAME).exists():
        try:
            return Manifest.read(folder)
        except BrokenCheckpoint as error:
            raise ConfigError([f"{key} = {path!r}: {error}"]) from None
    try:
        manifest = latest_checkpoint(folder)
    except ConfigError as error:
        raise ConfigError([f"{key} = {path!r}: {problem}" for problem in error.problems]) from None
    if manifest is None:
        raise ConfigError([f"{key} = {path!r}: holds no complete checkpoint"])
    return manifest


def prune(run_dir: Path, keep: int, keep_every: int, saved: Path) -> None:
    """Remove what is no longer wanted once ``saved``, which was just written, is there.

    Kept: the ``keep`` newest complete ones up to ``saved``, those of steps that ``keep_every`` divides, what
    another version of this code wrote or the disk does not read, and whatever lies beyond ``saved``: a start
    may have gone on from an older one while the disk failed. Broken ones are removed too.
    """
    complete, broken = [], []
    for folder in checkpoints(run_dir):
        if step_of(folder) > step_of(saved):
            break
        try:
            Manifest.read(folder)
        except UnreadableCheckpoint:
            continue
        except BrokenCheckpoint:
            broken.append(folder)
            continue
        complete.append(folder)
    kept = {
        saved,
        *complete[-keep:],
        *(folder for folder in complete if keep_every and step_of(folder) % keep_every == 0),
    }
    for folder in (*complete, *broken):
        if folder not in kept:
            remove(folder)


def remove(folder: Path) -> None:
    """The manifest goes first: whatever interrupts the rest leaves no checkpoint that looks complete."""
    with contextlib.suppress(OSError):  # it is only tidying up: a save that is there must not fail by it
        if not folder.is_dir():
            folder.unlink()
            return
        (folder / NAME).unlink(missing_ok=True)
        sync(folder)
    shutil.rmtree(folder, ignore_errors=True)


PARTIAL, OLDER = ".partial", ".older.partial"


def replace(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target``.

    What bore it, the same step saved before and broken since, goes once that is done.

    What another version of this code wrote, or the disk does not read, stays, as ``step_....other``.
    """
    older, other = target.with_name(f".{target.name}{OLDER}"), target.with_name(f"{target.name}.other")
    if target.exists():
        remove(older)  # left by a save whose tidying up failed
        target.rename(older)
    try:
        source.rename(target)
    except OSError:
        if older.exists():
            older.rename(target)
        raise
    with contextlib.suppress(OSError):  # the save is there
        sync(target.parent)
        if older.exists() and _usable_by_other_version(older) and not other.exists():
            older.rename(other)
    remove(older)


def _usable_by_other_version(folder: Path) -> bool:
    try:
        Manifest.read(folder)
    except UnreadableCheckpoint:
        return True
    except BrokenCheckpoint:
        return False
    return False


def remove_leftovers(run_dir: Path) -> None:
    """Remove what interrupted saves left; only the holder of the run's lock may."""
    # killed between two renames: the name is its own again
    for folder in (run_dir / "checkpoints").glob(f".step_*{OLDER}"):
        target = folder.with_name(folder.name[1:].removesuffix(OLDER))
        if not target.exists():
            folder.rename(target)
    for folder in (run_dir / "checkpoints").glob(f".step_*{PARTIAL}"):
        remove(folder)
