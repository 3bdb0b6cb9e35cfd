"""Prepare a corpus once: source -> tokenizer -> token shards, in a folder that appears whole or not at all.

The work is done in a hidden sibling folder under a file lock and then renamed. Whoever comes while it is
being done waits for it; a preparer that dies leaves a hidden folder that the next one removes, and a lock
that the system has let go of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from sffn_dist.atomic_io import sync
from sffn_dist.data.metadata import CorpusError, is_usable, locate, read_meta
from sffn_dist.spec.config import Config, ConfigError

log = logging.getLogger(__name__)


def prepare(config: Config) -> Path:
    """The folder of the prepared corpus of ``config``; prepares it on first use.

    Raises:
        ConfigError: bad or unreadable ``data.source``, ``data.tokenizer``, ``data.dir``.
    """
    folder = locate(config)
    if is_usable(folder):
        _say_if_estimated(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not is_usable(folder):  # another process may have just finished it
                _sweep(folder)
                _say_if_broken(folder)
                _prepare(config, folder)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            [f"data.dir = {json.dumps(config.data.dir)}: must be a folder to write to: {error}"]
        ) from error
    return folder


def _say_if_estimated(folder: Path) -> None:
    meta = read_meta(folder)
    if not meta.byte_exact and not meta.heldout_bytes:
        log.warning(
            "%s: an earlier version prepared it, and did not count the bytes of its tokens: bits per byte "
            "are an estimate; remove the folder to have it prepared again",
            folder,
        )


def _prepare(config: Config, folder: Path) -> None:
    from sffn_dist.data.build import build

    started = time.monotonic()
    log.info(
        "preparing data.source = %s for model.vocab = %d in %s",
        config.data.source,
        config.model.vocab,
        folder,
    )
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        meta = build(config, temporary, folder.name)
        if locate(config) != folder:
            raise ConfigError(
                [f"data.source = {json.dumps(config.data.source)}: changed while it was read; start again"]
            )
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info(
        "prepared %s tokens to train on and %s held out, %.2f bytes a token, in %.1f s",
        f"{meta.train.tokens:,}",
        f"{meta.heldout.tokens:,}",
        (meta.train.bytes + meta.heldout.bytes) / (meta.train.tokens + meta.heldout.tokens),
        time.monotonic() - started,
    )


def _say_if_broken(folder: Path) -> None:
    if folder.exists():
        try:
            read_meta(folder)
        except CorpusError as error:
            log.warning("preparing again what cannot be used: %s", error)


def _publish(temporary: Path, folder: Path) -> None:
    """Make the finished folder appear under its name, safe against a power cut at any moment."""
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    if folder.exists():
        broken = _temporary(folder, "broken")
        folder.rename(broken)
        shutil.rmtree(broken)
    temporary.rename(folder)
    sync(folder.parent)


# ---------------------------------------------------------------------------------------------------- locking


def _temporary(folder: Path, kind: str = "tmp") -> Path:
    return folder.parent / f".{folder.name}.{kind}"  # one name is enough: only the holder of the lock uses it


def _lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"  # never removed: a waiter may hold it open


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; logs once if that means waiting."""
    with open(_lock_file(folder), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which is preparing %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove what dead preparers left in data.dir; the caller holds the lock of ``folder``."""
    for kind in ("tmp", "broken"):
        for left in folder.parent.glob(f".*.{kind}"):
            owner = folder.parent / left.name[1 : -len(kind) - 1]
            with contextlib.ExitStack() as stack:
                if owner != folder:
                    file = stack.enter_context(open(_lock_file(owner), "a"))
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue  # alive
                log.info("removing %s, left by a preparation that did not end", left)
                shutil.rmtree(left, ignore_errors=True)
