"""Local files: which there are, and in which order they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class SourceFile(NamedTuple):
    """A file of the source; ``relative`` is its path from the source's folder, with ``/``."""

    path: Path
    relative: str
    size: int
    mtime_ns: int


def in_reading_order(files: Iterable[SourceFile]) -> list[SourceFile]:
    """By a hash of the relative path: the same everywhere, and the first megabytes are a fair sample of the
    whole.

    (A tokenizer is trained on them; alphabetical order is no fair sample.)
    """
    return sorted(
        files, key=lambda file: (hashlib.blake2b(os.fsencode(file.relative)).digest(), file.relative)
    )


def walk(top: Path, suffix: str, left_out: frozenset[str]) -> Iterator[SourceFile]:
    """Every file below ``top`` with the suffix; hidden names and folders ``left_out`` are passed over."""
    for folder, inner, names in os.walk(top):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in left_out)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() == suffix and not name.startswith(".") and path.is_file():
                yield source_file(path, path.relative_to(top).as_posix())


def source_file(path: Path, relative: str) -> SourceFile:
    """A file with its size and time as they are now."""
    status = path.stat()
    return SourceFile(path, relative, status.st_size, status.st_mtime_ns)
