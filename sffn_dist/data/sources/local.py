"""A file, or a folder of files, of .txt, .jsonl, .json and .parquet; all but parquet perhaps compressed.

* ``.txt``: a document a file, or as many as ``data.document_separator`` ends (sources/text.py).
* ``.jsonl``, ``.json`` and ``.parquet``: a document a row, column ``data.text_field``; null and empty texts
  are skipped (sources/rows.py).

Which files of a folder are read, and which are not, stands in sources/listing.py.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sffn_dist.data.sources.base import Item, Source, digest
from sffn_dist.data.sources.files import SourceFile, in_reading_order, source_file
from sffn_dist.data.sources.formats import COMPRESSIONS, JSON_LINES, PARQUET, TEXT, Format, format_of
from sffn_dist.data.sources.listing import Listing, by_reason, list_files
from sffn_dist.data.sources.rows import json_file, json_lines, parquet_rows
from sffn_dist.data.sources.text import is_large, text_documents
from sffn_dist.spec.config import Data


def path_of(data: Data) -> Path:
    return Path(data.source).expanduser()


def listing(data: Data) -> Listing:
    """What the source holds: read and not read."""
    return list_files(path_of(data), data.ignore)


def files(data: Data) -> list[SourceFile]:
    """The files of the source, as they are read."""
    return in_reading_order(source_file(file.path, file.relative) for file in listing(data).files)


class LocalFiles(Source):
    """The last kind of the table: what is no other is a path."""

    form = f"a file or folder of .txt/.jsonl/.json ({', '.join(COMPRESSIONS)} too)/.parquet"
    checked_first = True

    def matches(self, source: str) -> bool:
        return True

    def problem(self, data: Data) -> str | None:
        path = path_of(data)
        if not data.source or not path.exists():
            return "there is no such file or folder"
        if path.is_file() and format_of(path.name) is None:
            return f"this file's name ends in {path.suffix or 'no suffix'!r}"
        if not os.access(path, os.R_OK):
            return "it cannot be read (permissions)"
        found = listing(data)
        if refused := found.refused():
            pattern = json.dumps([_pattern(refused[0].relative)])
            return (
                f"it holds what looks like data and is not read: {'; '.join(by_reason(refused))}. "
                f"Convert it, or leave it out by name or glob pattern: data.ignore='{pattern}'"
            )
        if not found.files:
            return "; ".join(["this folder holds no such file", *by_reason(found.not_read)])
        return None

    def identity(self, data: Data) -> dict[str, Any]:
        source_files = files(data)
        kinds = {_format(file).kind for file in source_files}
        identity: dict[str, Any] = {
            "files": digest([(file.relative, file.size, file.mtime_ns) for file in source_files]),
            "text_field": data.text_field if kinds - {TEXT} else None,
        }
        if TEXT in kinds:
            identity["document_separator"] = data.document_separator
        if data.bad_rows != "refuse":
            identity["bad_rows"] = data.bad_rows
        return identity

    def files(self, data: Data) -> list[SourceFile]:
        return files(data)

    def label(self, data: Data) -> str:
        return path_of(data).absolute().stem

    def documents(self, data: Data) -> Iterator[Item]:
        by_kind: dict[str, list[SourceFile]] = {TEXT: [], JSON_LINES: [], PARQUET: []}
        large: list[SourceFile] = []
        for file in files(data):
            kind, compression = _format(file)
            unusual = kind == TEXT and (compression or is_large(file.size))
            (large if unusual else by_kind[kind if kind in by_kind else JSON_LINES]).append(file)
        for file in [*by_kind[TEXT], *large]:
            yield from text_documents(file.path, _format(file).compression, data.document_separator)
        for file in by_kind[JSON_LINES]:
            kind, compression = _format(file)
            read = json_lines if kind == JSON_LINES else json_file
            yield from read(data, file.path, compression)
        for file in by_kind[PARQUET]:
            yield from parquet_rows(data, file.path)

    def contents(self, data: Data) -> list[str]:
        found = listing(data)
        endings = Counter(_ending(file.relative) for file in found.files)
        read = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
        idle = [f"holds nothing that data.ignore = {json.dumps(text)} names" for text in found.idle_patterns]
        return [f"reads {read}", *(f"does not read {line}" for line in by_reason(found.not_read)), *idle]


def _format(file: SourceFile) -> Format:
    name_format = format_of(file.path.name)
    assert name_format is not None, file  # the listing holds no others
    return name_format


def _ending(name: str) -> str:
    """``.jsonl`` or ``.jsonl.gz``."""
    path = Path(name.lower())
    return Path(path.stem).suffix + path.suffix if path.suffix in COMPRESSIONS else path.suffix


def _pattern(relative: str) -> str:
    suffix = Path(relative).suffix
    return f"*{suffix}" if suffix and format_of(relative) is None else relative
