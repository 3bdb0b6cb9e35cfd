"""Prepare a corpus once: source -> tokenizer -> token shards, in a folder that appears whole or not at all.

Every preparer works in a hidden sibling folder of a name of its own, reads it back, and renames it. Who loses
that race uses the winner's folder. A claim (launch/claim.py) saves two runs from doing the same work; nothing
depends on it, nor on ``flock``. Of the ranks of one run the first of each file system prepares (ranks.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sffn_dist.atomic_io import sync
from sffn_dist.data.meta_file import CorpusError, is_usable, read_meta
from sffn_dist.data.metadata import locate
from sffn_dist.data.ranks import Preparation, Ranks
from sffn_dist.launch import claim
from sffn_dist.launch.claim import Claim
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.disk_errors import explained

log = logging.getLogger(__name__)

PREPARER_NAME = "preparer"  # in the folder that is being filled: who does it, with a heartbeat
# a leftover that does not name its preparer is removed after so many seconds without a change
NAMELESS_SECONDS = 86400.0
VISIBLE_SECONDS = 120.0  # clients of network file systems see a new folder up to 60 s late
_RACES = 3  # renames tried, where broken folders appear in between
_REFUSED_RENAME = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


def prepare(config: Config, ranks: Ranks | None = None) -> Path:
    """The folder of the prepared corpus of ``config``; prepares it on first use.

    With ``ranks`` every rank must call it. The first rank of each file system prepares and the others wait,
    in no collective.

    Raises:
        ConfigError: bad or unreadable ``data.source``, ``data.tokenizer``, ``data.dir``.
        DiskError: the disk of ``data.dir`` failed.
    """
    folder = locate(config)
    with explained("data.dir", config.data.dir):
        usable = is_usable(folder)
        if usable and (ranks is None or not ranks.rank):
            _say_if_estimated(folder)
        if ranks is None or ranks.world == 1:
            if not usable:
                _prepare_once(config, folder)
            return folder
        preparation = Preparation(ranks, folder.parent)
        preparer = preparation.find_preparer(usable)
        if not usable and preparer == ranks.rank:
            with _progress_shown(ranks.rank):
                _prepare_once(config, folder)
            preparation.report_done()
        elif not usable and not preparation.wait_for(preparer, lambda: is_usable(folder), VISIBLE_SECONDS):
            rule = f"rank {preparer} prepared {folder}, which rank {ranks.rank} cannot use"
            raise ConfigError([f"data.dir = {config.data.dir!r}: {rule} on {platform.node()}"])
    return folder


def _say_if_estimated(folder: Path) -> None:
    meta = read_meta(folder)
    if not meta.byte_exact and not meta.heldout_bytes:
        log.warning(
            "%s: an earlier version prepared it, and did not count the bytes of its tokens: bits per byte "
            "are an estimate; remove the folder to have it prepared again",
            folder,
        )


@contextlib.contextmanager
def _progress_shown(rank: int) -> Iterator[None]:
    """Show the progress of a preparer that is not rank 0 too, with its rank: only rank 0 logs otherwise."""
    logger = logging.getLogger("sffn_dist")
    if logger.isEnabledFor(logging.INFO):
        yield
        return
    level, propagate = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"rank {rank} on {platform.node()}: %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _prepare_once(config: Config, folder: Path) -> None:
    """Prepare ``folder``, unless another run is doing so: then wait for it, for as long as it lives."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    own_claim, told = Claim(folder.parent / f".{folder.name}.preparing"), False
    while (seen := _seen_holder(own_claim)) is not None:
        if not told:
            told = True
            log.info("waiting for another process, which is preparing %s: %s", folder, seen.describe())
        time.sleep(0.2)
        if is_usable(folder):
            return
    try:
        if not is_usable(folder):  # another process may have just finished it
            _sweep(folder.parent)
            _say_if_broken(folder)
            _prepare(config, folder)
    finally:
        own_claim.release()


def _seen_holder(own_claim: Claim) -> claim.Seen | None:
    """Who prepares; None where this process may. A dead user's claim may not be ours to remove."""
    try:
        return own_claim.try_take()
    except PermissionError:
        return None


def _prepare(config: Config, folder: Path) -> None:
    from sffn_dist.data.build import build

    started = time.monotonic()
    log.info(
        "preparing data.source = %s for model.vocab = %d in %s",
        config.data.source,
        config.model.vocab,
        folder,
    )
    with _own_folder(folder) as (temporary, preparer):
        meta = build(config, temporary, folder.name)
        if locate(config) != folder:
            raise ConfigError(
                [f"data.source = {config.data.source!r}: changed while it was read; start again"]
            )
        _publish(temporary, preparer, folder)
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


def _publish(temporary: Path, preparer: Claim, folder: Path) -> None:
    """Make the finished folder appear under its name, safe against a power cut at any moment.

    Only what reads back as it was written appears. Raises CorpusError otherwise.
    """
    from sffn_dist.data.shards import verify

    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    verify(temporary)
    preparer.release()  # its file is no part of a corpus
    for _ in range(_RACES):
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in _REFUSED_RENAME:
                raise
            if _remove_broken(folder):
                continue
            log.info("another process has prepared %s meanwhile; using that", folder)
            return
        sync(folder.parent)
        return
    raise CorpusError(f"{folder}: other processes publish broken folders there; look who else prepares it")


def _remove_broken(folder: Path) -> bool:
    """Move away what stands in the place of a corpus, unless it is whole; whether the place is free."""
    from sffn_dist.data.shards import verify

    try:
        identity = folder.stat().st_ino
        verify(folder)
        return False
    except CorpusError:
        pass
    except FileNotFoundError:
        return True
    with _own_folder(folder) as (discard, _):
        if folder.stat().st_ino == identity:  # not what another process has put there meanwhile
            folder.rename(discard / "broken")
    return True


# ------------------------------------------------------------------------------------- folders of one's own


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[tuple[Path, Claim]]:
    """A hidden folder beside ``folder``, of a name that no other process has, and the claim in it; gone at
    the end.
    """
    host = re.sub(r"[^A-Za-z0-9-]+", "-", platform.node())[:32]
    unique = f"{host}.{os.getpid()}.{time.time_ns()}.{secrets.token_hex(4)}"
    temporary = folder.parent / f".{folder.name}.{unique}.tmp"
    temporary.mkdir()
    preparer = Claim(temporary / PREPARER_NAME)
    try:
        preparer.try_take()
        yield temporary, preparer
    finally:
        preparer.release()
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(data_dir: Path) -> None:
    """Remove what dead preparers left in data.dir, and nothing else."""
    for pattern in (".*.tmp", ".*.broken"):
        for left in data_dir.glob(pattern):
            with contextlib.suppress(OSError):  # just published by its preparer, or another user's
                if left.is_dir() and _is_dead(left):
                    log.info("removing %s, left by a preparation that did not end", left)
                    shutil.rmtree(left, ignore_errors=True)


def _is_dead(left: Path) -> bool:
    seen = claim.look(left / PREPARER_NAME, clock=left.parent)
    if seen is not None:
        return seen.is_dead()
    newest = max(path.stat().st_mtime_ns for path in (left, *left.iterdir()))
    return claim.file_system_time(left.parent) - newest > 1e9 * NAMELESS_SECONDS
