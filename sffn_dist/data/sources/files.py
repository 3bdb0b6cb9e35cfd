"""Local files: which there are, in which order they are read, and how they are opened through HuggingFace
``datasets``.

They are streamed, never copied into a cache, and without contacting the hub. Line ends become ``\\n``.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


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


def walk(
    top: Path, suffixes: tuple[str, ...], left_out: frozenset[str] = frozenset()
) -> Iterator[SourceFile]:
    """Every file below ``top`` (or ``top`` itself) with one of the suffixes.

    Hidden names and folders ``left_out`` are passed over.
    """
    if top.is_file():
        yield _source_file(top, top.parent)
        return
    for folder, inner, names in os.walk(top):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in left_out)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and not name.startswith(".") and path.is_file():
                yield _source_file(path, top)


def _source_file(path: Path, top: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(path, path.relative_to(top).as_posix(), status.st_size, status.st_mtime_ns)


def whole_files(files: list[Path]) -> Iterator[str]:
    """A document a file."""
    if files:
        for row in open_files("text", files, sample_by="document"):
            yield row["text"]


def open_files(builder: str, files: list[Path], **options: Any) -> Any:
    """Stream local files without contacting the hub."""
    with _quietly_offline():
        import datasets

        # names are patterns to datasets: a file called a[1].txt must not be read as one
        names = [glob.escape(str(path.absolute())) for path in files]
        return datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **options)


@contextlib.contextmanager
def _quietly_offline() -> Iterator[None]:
    """No network (if datasets is first imported here) and no progress bars for local files.

    The environment is put back.
    """
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import datasets

        bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if bars:
                datasets.enable_progress_bars()
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
