"""What lies in place of a file that was not fetched whole: a Git LFS pointer, a server's page, nothing."""

from __future__ import annotations

import json
from pathlib import Path

from sffn_dist.spec.config import ConfigError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PAGES = (b"<!doctype", b"<html", b"<?xml")
HEADER_LENGTH = 8  # bytes that a safetensors file begins with: the length of its JSON header


def check(path: Path) -> None:
    """Raises ConfigError where ``path`` is a file that only stands for the one that is wanted.

    What is missing or cannot be opened is left to who reads it.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError:
        return
    if not start:
        raise ConfigError([f"{path}: is empty; fetch it again"])
    if start.startswith(LFS_POINTER):
        raise ConfigError(
            [f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}"]
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES):
        raise ConfigError(
            [f"{path}: is a web page, such as a server sends in place of a file; fetch it again"]
        )


def check_safetensors(path: Path) -> None:
    """Raises ConfigError where a safetensors file is shorter than its header says, or another file is there.

    A header that cannot be read is left to safetensors.
    """
    check(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(HEADER_LENGTH), "little")
            if size <= HEADER_LENGTH or length > min(size, 100_000_000):
                return
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = HEADER_LENGTH + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return
    if size < needed:
        raise ConfigError(
            [f"{path}: holds {size} bytes of the {needed} that its header names: truncated; fetch it again"]
        )
