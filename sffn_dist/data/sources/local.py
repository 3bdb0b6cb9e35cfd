"""A file, or a folder of files, of .txt, .jsonl and .parquet.

* a ``.txt`` file is a document; one of more than :data:`LARGE` bytes is cut into documents of about
  :data:`PART` characters at line ends, so that neither memory nor the split into training and held-out text
  hangs on one huge file.
* ``.jsonl`` and ``.parquet``: a document a row, column ``data.text_field``; null and empty texts are skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sffn_dist.data.sources.base import ROWS, Source, digest, missing_column_error, source_error, text_of
from sffn_dist.data.sources.files import SourceFile, in_reading_order, open_files, walk, whole_files
from sffn_dist.spec.config import Data

SUFFIXES = (".txt", ".jsonl", ".parquet")
LARGE = 16 << 20  # bytes of a text file
PART = 1 << 20  # characters


def path_of(data: Data) -> Path:
    return Path(data.source).expanduser()


def files(data: Data) -> list[SourceFile]:
    """The files of the source, as they are read."""
    return in_reading_order(walk(path_of(data), SUFFIXES))


class LocalFiles(Source):
    """The last kind of the table: what is no other is a path."""

    form = "a file or folder of " + "/".join(SUFFIXES)

    def matches(self, source: str) -> bool:
        return True

    def problem(self, data: Data) -> str | None:
        path = path_of(data)
        if not data.source or not path.exists():
            return "there is no such file or folder"
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            return f"this file's name ends in {path.suffix or 'no suffix'!r}"
        if not os.access(path, os.R_OK):
            return "it cannot be read (permissions)"
        if next(walk(path, SUFFIXES), None) is None:
            return "this folder holds no such file"
        return None

    def identity(self, data: Data) -> dict[str, Any]:
        source_files = files(data)
        has_columns = any(not file.relative.lower().endswith(".txt") for file in source_files)
        return {
            "files": digest([(file.relative, file.size, file.mtime_ns) for file in source_files]),
            "text_field": data.text_field if has_columns else None,
        }

    def files(self, data: Data) -> list[SourceFile]:
        return files(data)

    def label(self, data: Data) -> str:
        return path_of(data).absolute().stem

    def documents(self, data: Data) -> Iterator[str]:
        paths: dict[str, list[Path]] = {".txt": [], ".jsonl": [], ".parquet": []}
        large: list[Path] = []
        for file in files(data):
            suffix = file.path.suffix.lower()
            (large if suffix == ".txt" and file.size > LARGE else paths[suffix]).append(file.path)
        yield from whole_files(paths[".txt"])
        for path in large:
            yield from _parts(path)
        yield from _json_lines(data, paths[".jsonl"])
        yield from _parquet(data, paths[".parquet"])


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file, with their line ends."""
    for rows in open_files("text", [file], keep_linebreaks=True).iter(batch_size=ROWS):
        yield from rows["text"]


def _parts(file: Path) -> Iterator[str]:
    """A large file as documents of whole lines."""
    part: list[str] = []
    length = 0
    for line in _lines(file):
        part.append(line)
        length += len(line)
        if length >= PART:
            yield "".join(part)
            part, length = [], 0
    yield "".join(part)


def _json_lines(data: Data, files: list[Path]) -> Iterator[str]:
    """Rows of .jsonl files.

    Parsed line by line: the JSON builder requires all rows of all files to have one schema.
    """
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip("\ufeff \t\n"):
                continue
            try:
                row = json.loads(line.lstrip("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise source_error(data, f"line {number} of {file} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise source_error(data, f"line {number} of {file} must hold a JSON object")
            if data.text_field not in row:
                raise missing_column_error(data, row)
            yield text_of(data, row[data.text_field])


def _parquet(data: Data, files: list[Path]) -> Iterator[str]:
    for file in files:  # one at a time: columns other than the text may differ between files
        columns = open_files("parquet", [file]).column_names or []
        if data.text_field not in columns:
            raise missing_column_error(data, columns)
        for rows in open_files("parquet", [file], columns=[data.text_field]).iter(batch_size=ROWS):
            for value in rows[data.text_field]:
                yield text_of(data, value)
