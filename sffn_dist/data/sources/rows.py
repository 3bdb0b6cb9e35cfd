"""Files of rows -> documents: JSON lines, JSON arrays, parquet. Some megabytes of rows at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sffn_dist.data.sources.base import (
    BATCH_BYTES,
    ROWS,
    BadRow,
    FileNote,
    Item,
    missing_column_error,
    row_item,
)
from sffn_dist.data.sources.formats import is_damage, open_file, with_name
from sffn_dist.data.sources.text import TextReader
from sffn_dist.spec.config import Data

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_TOKEN = 16  # characters that an incomplete number, literal or escape has at most


class RepeatedKeys(dict[str, Any]):
    """An object that held a key twice; of those the last value is there."""


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What json makes an object of, marked where it drops something."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else RepeatedKeys(row)


class MalformedJSON(ValueError):
    """The text is no JSON, from here on."""


def json_lines(data: Data, path: Path, compression: str) -> Iterator[Item]:
    """A document a line. Rows need no common schema, and blank lines are none."""
    number = rows = 0
    with open_file(path, compression) as stream:
        while True:
            try:
                line = stream.readline()
            except Exception as error:
                if not is_damage(error):
                    raise with_name(error, path) from None
                yield BadRow(
                    f"line {number + 1} of {path}", f"is cut off or damaged: {error}", ends_file=True
                )
                return
            if not line:
                break
            number += 1
            line = line.removeprefix(_BOM)
            if line.strip():
                rows += 1
                yield _line_item(data, line, f"line {number} of {path}")
    if not rows:
        yield FileNote("holds nothing", str(path))


def _line_item(data: Data, line: bytes, where: str) -> Item:
    try:
        row = json.loads(line.decode(), object_pairs_hook=unique_object)
    except UnicodeDecodeError as error:
        return BadRow(where, f"must be UTF-8 text: {error.reason}")
    except (ValueError, RecursionError) as error:
        cut_off = "" if line.endswith(b"\n") else " (the line has no end: the file seems to be cut off)"
        return BadRow(where, f"is not JSON: {error}{cut_off}")
    return _json_item(data, row, where)


def _json_item(data: Data, row: Any, where: str) -> Item:
    if isinstance(row, RepeatedKeys):
        return BadRow(where, "holds a key twice: which value counts is not known")
    return row_item(data, row, where)


def json_file(data: Data, path: Path, compression: str) -> Iterator[Item]:
    """A ``.json`` file: an array of objects, objects one after the other, or JSON lines under that name."""
    with open_file(path, compression) as stream:
        if _is_lines(stream):
            yield from json_lines(data, path, compression)
            return
    rows = 0
    with open_file(path, compression) as stream:
        reader = TextReader(path, stream)
        try:
            for rows, row in enumerate(json_values(reader.decoded(reader.raw_chunks())), start=1):
                yield _json_item(data, row, f"row {rows} of {path}")
        except (MalformedJSON, RecursionError) as error:
            problem = f"is not JSON: {error}"
            yield reader.damage or BadRow(f"row {rows + 1} of {path}", problem, ends_file=True)
            return
        if reader.damage:
            yield reader.damage
        elif not rows:
            yield FileNote("holds nothing", str(path))


def _is_lines(stream: BinaryIO) -> bool:
    """Whether the first line is an object by itself."""
    try:
        first = stream.readline(1 << 16).removeprefix(_BOM).lstrip()
        if first[:1] != b"{":
            return False
        return isinstance(json.loads(first + stream.readline() * (not first.endswith(b"\n"))), dict)
    except Exception as error:
        if isinstance(error, (ValueError, RecursionError)) or is_damage(error):
            return False
        raise


def json_values(chunks: Iterator[str]) -> Iterator[Any]:
    """The items of a JSON array, or JSON values one after the other, holding one of them at a time.

    Raises:
        MalformedJSON: what comes next is neither.
    """
    text = _Lookahead(chunks)
    array = text.next_character() == "["
    text.start += array
    for index in itertools.count():
        character = text.next_character()
        if array and character == "]":
            text.start += 1
            if text.next_character():
                raise MalformedJSON("text follows the array's closing bracket")
            return
        if not character:
            if array:
                raise MalformedJSON("the array has no closing bracket; the file seems to be cut off")
            return
        if array and index:
            if character != ",":
                raise MalformedJSON(f"{character!r} where a comma must stand between two items")
            text.start += 1
            text.next_character()
        yield text.value()


class _Lookahead:
    """The text from ``start`` on, of which more is read as it is asked for."""

    def __init__(self, chunks: Iterator[str]):
        self.start = 0
        self._chunks, self._text, self._decoder = (
            chunks,
            "",
            json.JSONDecoder(object_pairs_hook=unique_object),
        )
        self._ended = False

    def next_character(self) -> str:
        """The next character that is no white space, at ``start``; "" at the end."""
        while True:
            rest = len(self._text)
            while self.start < rest and self._text[self.start] in _SPACE:
                self.start += 1
            if self.start < rest or not self._more(1):
                return self._text[self.start : self.start + 1]

    def value(self) -> Any:
        """The value at ``start``, whole. A long one is tried again each time as much text is there again."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.start)
            except json.JSONDecodeError as error:
                incomplete = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _TOKEN
                if not incomplete or not self._more(len(self._text) - self.start):
                    raise MalformedJSON(f"{error.msg}{self._at_end()}") from None
                continue
            except ValueError as error:  # a number of more digits than Python reads
                raise MalformedJSON(str(error)) from None
            if end < len(self._text) or isinstance(value, (dict, list, str)) or not self._more(1):
                self.start = end
                return value

    def _at_end(self) -> str:
        return "; the file seems to be cut off" if self._ended else ""

    def _more(self, least: int) -> bool:
        """Read at least so many characters more; False where there are none."""
        added = list[str]()
        while sum(map(len, added)) < least and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            added.append(chunk or "")
        self._text = "".join([self._text[self.start :], *added])
        self.start = 0
        return any(added)


def parquet_rows(data: Data, path: Path) -> Iterator[Item]:
    """A document a row of the column ``data.text_field``; nothing else is read."""
    if not path.stat().st_size:
        yield FileNote("holds nothing", str(path))
        return
    import pyarrow
    import pyarrow.parquet as parquet

    row = 0
    try:
        # buffer_size: a column is read in small pieces, not a row group at a time
        with parquet.ParquetFile(path, buffer_size=BATCH_BYTES, pre_buffer=False) as file:
            if not file.metadata.num_rows:
                yield FileNote("holds nothing", str(path))
                return
            if data.text_field not in file.schema_arrow.names:
                raise missing_column_error(data, file.schema_arrow.names, str(path))
            rows = _rows_a_batch(file.metadata, data.text_field)
            for batch in file.iter_batches(batch_size=rows, columns=[data.text_field]):
                for value in batch.column(0):
                    row += 1
                    yield row_item(data, {data.text_field: value.as_py()}, f"row {row} of {path}")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and not is_damage(error):
            raise with_name(error, path) from None
        where = f"row {row + 1} of {path}" if row else str(path)
        yield BadRow(where, f"cannot be read as parquet: {error}", ends_file=True)


def _rows_a_batch(metadata: Any, column: str) -> int:
    """So many that they come to about BATCH_BYTES where rows are largest, and at most ROWS."""
    largest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(
            part.total_uncompressed_size
            for part in map(group.column, range(group.num_columns))
            if part.path_in_schema == column
        )
        largest = max(largest, size // max(1, group.num_rows))
    return max(1, min(ROWS, BATCH_BYTES // largest))
