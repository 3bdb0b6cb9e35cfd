"""A source's files by their content, not by where they lie or when they were written. Standard library only.

Preparation hashes all of them, one more pass over the text. They are hashed again only where a prepared
corpus was made of files of the same names and sizes, but other times; what comes of it is remembered in
data.dir.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sffn_dist.atomic_io import hash_file
from sffn_dist.data.sources.base import digest
from sffn_dist.data.sources.files import SourceFile


def names_digest(files: Sequence[SourceFile]) -> str:
    """Of the names, as far as they decide the order of reading, and sizes."""
    return digest([(_name(file, len(files)), file.size) for file in files])


def content_digest(files: Sequence[SourceFile]) -> str:
    """Of the names and all bytes; reads every file, some at a time."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(hash_file, (file.path for file in files)))
    return digest([(_name(file, len(files)), text) for file, text in zip(files, hashes, strict=True)])


def _name(file: SourceFile, count: int) -> str:
    """The name of an only file says no more than its form."""
    return file.path.suffix.lower() if count == 1 else file.relative


def remembered(folder: Path) -> Path | None:
    """The folder that holds the corpus of ``folder``, which was found to be of the same content."""
    try:
        return folder.with_name(_memory(folder).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None


def remember(folder: Path, same: Path) -> None:
    """See :func:`remembered`; where nothing can be written, the next start compares again."""
    try:
        _memory(folder).write_text(same.name + "\n", encoding="utf-8")
    except OSError:
        return


def _memory(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.same")
