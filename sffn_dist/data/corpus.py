"""Source -> documents, read through HuggingFace ``datasets``.

* ``stdlib``: the sources of Python's own standard library, a document a file; needs no download.
* a ``.txt`` file is a document; one of more than :data:`LARGE` bytes is cut into documents of about :data:`PART` characters at line
  ends, so that neither memory nor the split into training and held-out text hangs on one huge file.
* ``.jsonl`` and ``.parquet``: a document a row, column ``data.text_field``; null and empty texts are skipped.
* ``hf:<dataset>`` or ``hf:<dataset>:<configuration>``: split ``train``, column ``data.text_field``.

Local sources are streamed, never copied into a cache. Line ends become ``\\n``.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sffn_dist.data.metadata import hf_name, source_files
from sffn_dist.spec.config import ConfigError, Data

LARGE = 16 << 20  # bytes of a text file
PART = 1 << 20  # characters
_ROWS = 256  # read at a time from files with many rows


def documents(data: Data) -> Iterator[str]:
    """Every non-empty document of the source, in a fixed order.

    Raises:
        ConfigError: the source cannot be read, or has no text column of the name ``data.text_field``.
    """
    try:
        for text in _hub(data) if data.source.startswith("hf:") else _local(data):
            if text:
                yield text
    except (ConfigError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise _problem(data, f"must be UTF-8 text: {error}") from None
    except Exception as error:  # datasets and Arrow raise many kinds
        raise _problem(data, f"cannot be read: {type(error).__name__}: {error}") from error


def _problem(data: Data, rule: str) -> ConfigError:
    return ConfigError([f"data.source = {json.dumps(data.source)}: {rule}"])


def _column_problem(data: Data, columns: Iterable[str]) -> ConfigError:
    found = ", ".join(sorted(map(str, columns))) or "none"
    return ConfigError(
        [
            f"data.text_field = {json.dumps(data.text_field)}: must be a column of data.source = {data.source!r}, which has: {found}"
        ]
    )


def _checked(data: Data, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ConfigError([f"data.text_field = {json.dumps(data.text_field)}: must be a column of text; a row holds a {kind}"])
    return value


# ------------------------------------------------------------------------------------------------------------- local files


def _local(data: Data) -> Iterator[str]:
    files = source_files(data)
    if data.source == "stdlib":
        yield from _whole([file.path for file in files if _is_utf8(file.path)])
        return
    of: dict[str, list[Path]] = {".txt": [], ".jsonl": [], ".parquet": []}
    large: list[Path] = []
    for file in files:
        suffix = file.path.suffix.lower()
        (large if suffix == ".txt" and file.size > LARGE else of[suffix]).append(file.path)
    yield from _whole(of[".txt"])
    for path in large:
        yield from _parts(path)
    yield from _json_lines(data, of[".jsonl"])
    yield from _parquet(data, of[".parquet"])


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _whole(files: list[Path]) -> Iterator[str]:
    """A document a file."""
    if files:
        for row in _open("text", files, sample_by="document"):
            yield row["text"]


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file, with their line ends."""
    for rows in _open("text", [file], keep_linebreaks=True).iter(batch_size=_ROWS):
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
    """Rows of .jsonl files. Parsed line by line: the JSON builder wants all rows of all files to have one schema."""
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip("\ufeff \t\n"):
                continue
            try:
                row = json.loads(line.lstrip("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise _problem(data, f"line {number} of {file.name} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise _problem(data, f"line {number} of {file.name} must hold a JSON object")
            if data.text_field not in row:
                raise _column_problem(data, row)
            yield _checked(data, row[data.text_field])


def _parquet(data: Data, files: list[Path]) -> Iterator[str]:
    for file in files:  # one at a time: columns other than the text may differ between files
        columns = _open("parquet", [file]).column_names or []
        if data.text_field not in columns:
            raise _column_problem(data, columns)
        for rows in _open("parquet", [file], columns=[data.text_field]).iter(batch_size=_ROWS):
            for value in rows[data.text_field]:
                yield _checked(data, value)


def _open(builder: str, files: list[Path], **options: Any) -> Any:
    """Stream local files, with no word to the hub."""
    with _quietly_offline():
        import datasets

        # names are patterns to datasets: a file called a[1].txt must not be read as one
        names = [glob.escape(str(path.absolute())) for path in files]
        return datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **options)


@contextlib.contextmanager
def _quietly_offline() -> Iterator[None]:
    """No network (if datasets is first imported here) and no progress bars for local files; the environment is put back."""
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


# ----------------------------------------------------------------------------------------------------------------- the hub


def _hub(data: Data) -> Iterator[str]:
    """A dataset of the hub (or of its local cache), downloaded once by datasets and read from its memory-mapped copy."""
    import datasets

    name, configuration = hf_name(data.source)
    rows = datasets.load_dataset(name, configuration, split="train")
    if data.text_field not in rows.column_names:
        raise _column_problem(data, rows.column_names)
    for batch in rows.select_columns([data.text_field]).iter(batch_size=_ROWS):
        for value in batch[data.text_field]:
            yield _checked(data, value)
