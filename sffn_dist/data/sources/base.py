"""What a source of documents is: whether it can be read, what identifies it, and its documents."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from sffn_dist.data.sources.files import SourceFile
from sffn_dist.spec.config import ConfigError, Data

ROWS = 256  # read at a time from what has many rows


class Source(abc.ABC):
    """A kind of ``data.source``. Only :meth:`documents` reads text, and imports what that needs."""

    form: ClassVar[str]  # what data.source may be, for messages

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
    def documents(self, data: Data) -> Iterator[str]:
        """Every document, in a fixed order; raises ConfigError for a row without its text."""


def source_error(data: Data, rule: str) -> ConfigError:
    """An error about ``data.source``."""
    return ConfigError([f"data.source = {json.dumps(data.source)}: {rule}"])


def missing_column_error(data: Data, columns: Iterable[str]) -> ConfigError:
    """An error about ``data.text_field``, which is none of the ``columns``."""
    names = ", ".join(sorted(map(str, columns))) or "none"
    return ConfigError(
        [
            f"data.text_field = {json.dumps(data.text_field)}: must be a column of data.source = "
            f"{data.source!r}, which has: {names}"
        ]
    )


def text_of(data: Data, value: Any) -> str:
    """The text of a row's ``data.text_field``; null is empty. Raises ConfigError for anything but text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ConfigError(
            [
                f"data.text_field = {json.dumps(data.text_field)}: must be a column of text; a "
                f"row holds a {kind}"
            ]
        )
    return value


def digest(rows: list[Any]) -> str:
    """sha256 of rows of JSON values."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
