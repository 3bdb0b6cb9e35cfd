"""What a source of documents is: whether it can be read, what identifies it, and its documents."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

from sffn_dist.data.sources.files import SourceFile
from sffn_dist.spec.config import ConfigError, Data

# read at a time from what has many rows: at most so many, and about so many bytes
ROWS = 256
BATCH_BYTES = 8 << 20


class BadRow(NamedTuple):
    """A row or a file that gives no document: where it stands and what is wrong with it.

    ``ends_file``: nothing that follows it in its file could be read either.
    """

    where: str
    problem: str
    key: Literal["data.source", "data.text_field"] = "data.source"
    ends_file: bool = False


class FileNote(NamedTuple):
    """Something that the owner of a file should hear about, though it stops nothing."""

    note: Literal["holds nothing", "was cut", "is not UTF-8"]
    file: str


Item = str | BadRow | FileNote


class Source(abc.ABC):
    """A kind of ``data.source``. Only :meth:`documents` reads text, and imports what that needs."""

    form: ClassVar[str]  # what data.source may be, for messages
    checked_first: ClassVar[bool] = False  # rows may be bad one by one: all are read once before long work

    @abc.abstractmethod
    def matches(self, source: str) -> bool:
        """Whether ``data.source`` is of this kind; the first kind of the table that accepts it is taken."""

    @abc.abstractmethod
    def problem(self, data: Data) -> str | None:
        """The cheap check: why the source cannot be read; None if it seems that it can."""

    @abc.abstractmethod
    def identity(self, data: Data) -> dict[str, Any]:
        """What decides the text, as far as it is known before reading it.

        Another identity is another prepared folder.
        """

    def files(self, data: Data) -> list[SourceFile]:
        """Local files that it reads, in order, whose times are part of the identity; none of other kinds."""
        return []

    @abc.abstractmethod
    def label(self, data: Data) -> str:
        """A short name for the prepared folder."""

    @abc.abstractmethod
    def documents(self, data: Data) -> Iterator[Item]:
        """Every document in a fixed order, and in its place what gave none.

        Raises ConfigError where the whole source cannot be read, whatever ``data.bad_rows`` says.
        """

    def contents(self, data: Data) -> list[str]:
        """Lines that say what is read and what is not, without opening a file; for the plan and the log."""
        return ["is no folder: data.ignore leaves nothing out"] if data.ignore else []


def source_error(data: Data, rule: str) -> ConfigError:
    """An error about ``data.source``."""
    return ConfigError([f"data.source = {json.dumps(data.source)}: {rule}"])


def bad_row_message(data: Data, bad: BadRow) -> str:
    """One bad row as ``key = value: rule``."""
    rest = "; nothing after it in this file can be read" if bad.ends_file else ""
    if bad.key == "data.text_field":
        return f"data.text_field = {json.dumps(data.text_field)}: {bad.problem} ({bad.where})"
    return f"data.source = {json.dumps(data.source)}: {bad.where} {bad.problem}{rest}"


def _missing_column(data: Data, columns: Iterable[str]) -> str:
    names = ", ".join(sorted(map(str, columns))) or "none"
    return f"must be a column of data.source = {data.source!r}, which has: {names}"


def missing_column_error(data: Data, columns: Iterable[str], where: str) -> ConfigError:
    """An error about ``data.text_field``, which is none of the ``columns`` of a file or dataset."""
    bad = BadRow(where, _missing_column(data, columns), "data.text_field")
    return ConfigError([bad_row_message(data, bad)])


def row_item(data: Data, row: Any, where: str) -> Item:
    """The text of a row's ``data.text_field``; null is empty."""
    if not isinstance(row, dict):
        return BadRow(where, f"must hold a JSON object, holds a {type(row).__name__}")
    if data.text_field not in row:
        return BadRow(where, _missing_column(data, row), "data.text_field")
    value = row[data.text_field]
    if value is None:
        return ""
    if not isinstance(value, str):
        problem = f"must be a column of text; a row holds a {type(value).__name__}"
        return BadRow(where, problem, "data.text_field")
    return value


def digest(rows: list[Any]) -> str:
    """sha256 of rows of JSON values."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
