"""``stdlib``: the sources of Python's own standard library, a document a file; needs no download."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sffn_dist.data.sources.base import FileNote, Item, Source, digest
from sffn_dist.data.sources.files import SourceFile, in_reading_order, walk
from sffn_dist.spec.config import Data

# installed packages are no part of it
LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})


def folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def files() -> Iterator[SourceFile]:
    """Every source file."""
    return walk(folder(), ".py", LEFT_OUT)


class StandardLibrary(Source):
    """Files that are not UTF-8 (a few tests of Python's tokenize module) are left out."""

    form = '"stdlib"'

    def matches(self, source: str) -> bool:
        return source == "stdlib"

    def problem(self, data: Data) -> str | None:
        if next(files(), None) is None:
            return f"this Python has no standard library sources at {folder()}; name a file or folder"
        return None

    def identity(self, data: Data) -> dict[str, Any]:
        # builds of one version differ (some leave the tests out), so the listing is part of it; times of
        # installation are not
        listing = [(file.relative, file.size) for file in in_reading_order(files())]
        return {"stdlib": platform.python_version(), "files": digest(listing)}

    def label(self, data: Data) -> str:
        return data.source

    def documents(self, data: Data) -> Iterator[Item]:
        for file in in_reading_order(files()):
            try:
                yield file.path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                yield FileNote("is not UTF-8", str(file.path))
