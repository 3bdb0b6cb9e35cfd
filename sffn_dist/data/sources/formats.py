"""Formats of local files by their names, and how a file is opened. Imports nothing heavy before it opens one.

A name ends in a format, and perhaps in a compression: ``part-0.jsonl.zst``. Parquet compresses by itself.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

TEXT, JSON_LINES, JSON, PARQUET = ".txt", ".jsonl", ".json", ".parquet"
FORMATS = {TEXT: TEXT, JSON_LINES: JSON_LINES, ".ndjson": JSON_LINES, JSON: JSON, PARQUET: PARQUET}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
# what holds text or rows, and is read by no code here: tables, archives, other compressions
_TABLES = {".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".tfrecord", ".msgpack", ".warc"}
_ARCHIVES = {".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4", ".br", ".lzma", ".zstd", ".z", ".snappy"}
_DATA = {*FORMATS, *COMPRESSIONS, *_TABLES, *_ARCHIVES}


class Format(NamedTuple):
    """What a file holds, and how it is compressed; "" where it is not."""

    kind: str
    compression: str


def format_of(name: str) -> Format | None:
    """The format that a file's name states; None if it is not read."""
    base, compression = Path(name.lower()), ""
    if base.suffix in COMPRESSIONS:
        base, compression = base.with_suffix(""), COMPRESSIONS[base.suffix]
    kind = FORMATS.get(base.suffix)
    if kind is None or (kind == PARQUET and compression):
        return None
    return Format(kind, compression)


def looks_like_data(name: str) -> bool:
    """Whether a file that is not read, or cannot be, would seem to its owner to be part of the corpus."""
    return Path(name.lower()).suffix in _DATA


def open_file(path: Path, compression: str) -> BinaryIO:
    """The bytes of a file, decompressed while they are read.

    Raises:
        OSError: it cannot be opened.
        ImportError: it cannot be decompressed here; the message says what to install.
    """
    if not compression:
        return open(path, "rb")
    try:
        return _decompressed(path, compression)
    except ImportError as error:
        raise ImportError(f"{path} cannot be decompressed here: {error}") from None


def is_damage(error: Exception) -> bool:
    """Whether an error while reading is the file's own fault: cut off, or not what its name states.

    One with a number is the system's: a disk that fails, a server that is gone.
    """
    named = isinstance(error, (EOFError, zlib.error)) or type(error).__name__ == "LZMAError"
    return named or (isinstance(error, OSError) and error.errno is None)


def with_name(error: Exception, path: Path) -> Exception:
    """An error of the system that says which file was being read."""
    if isinstance(error, OSError) and error.filename is None:
        return OSError(error.errno, error.strerror, str(path))
    return error


def _decompressed(path: Path, compression: str) -> BinaryIO:
    if compression == "gzip":
        import gzip

        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == "bz2":
        import bz2

        return cast(BinaryIO, bz2.open(path, "rb"))
    if compression == "xz":
        import lzma

        return cast(BinaryIO, lzma.open(path, "rb"))
    return _zstd(path)


def _zstd(path: Path) -> BinaryIO:
    """By pyarrow, which datasets and parquet need anyway; Python has a zstd of its own from 3.14 on."""
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise ImportError("this build of pyarrow has no zstd; pip install pyarrow brings one that has")
    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
