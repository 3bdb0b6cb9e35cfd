"""Source -> documents, whatever kind the source is of (data/sources/), and the count of what gave none."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from sffn_dist.data.sources import source_of
from sffn_dist.data.sources.base import BadRow, FileNote, Item, bad_row_message, source_error
from sffn_dist.spec.config import ConfigError, Data

log = logging.getLogger(__name__)

SHOWN = 5  # bad rows and files that are named
ENOUGH = 100  # bad rows after which the check ends: all rows are bad where data.text_field is misspelt
NEWS = 5.0  # seconds between lines of progress


@dataclass
class Passed:
    """What a pass over the source met besides documents with text."""

    documents: int = 0
    empty_documents: int = 0
    bad_rows: int = 0
    half_surrogates: int = 0  # documents with half a surrogate pair
    shown: list[str] = field(default_factory=list)  # the first bad rows, as messages
    notes: dict[str, list[str]] = field(default_factory=dict)  # what -> files

    def see(self, data: Data, item: Item) -> str:
        """Count an item; returns its text, or "" where it has none."""
        if isinstance(item, FileNote):
            self.notes.setdefault(item.note, []).append(item.file)
            return ""
        if isinstance(item, BadRow):
            self.bad_rows += 1
            if len(self.shown) < SHOWN:
                self.shown.append(bad_row_message(data, item))
            return ""
        self.documents += bool(item)
        self.empty_documents += not item
        try:
            item.encode()
        except UnicodeEncodeError:  # JSON may hold half a surrogate pair, which is no text
            self.half_surrogates += 1
            return item.encode(errors="replace").decode()
        return item

    def lines(self) -> Iterator[str]:
        """What a reader of the log should hear."""
        if self.bad_rows:
            more = f" (the first {len(self.shown)})" if self.bad_rows > len(self.shown) else ""
            kept = f"{self.documents:,} documents were kept"
            yield f"data.bad_rows = skip: skipped {self.bad_rows:,} bad rows, {kept}{more}:"
            yield from (f"  {line}" for line in self.shown)
        if self.empty_documents:
            yield f"skipped {self.empty_documents:,} empty documents"
        if self.half_surrogates:
            yield f"{self.half_surrogates:,} documents hold half a surrogate pair, no text: '?' stands for it"
        for note, files in self.notes.items():
            more = f", and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
            yield f"{_NOTES[note].format(len(files))}: {', '.join(files[:SHOWN])}{more}"


_NOTES = {
    "holds nothing": "{} files hold no row and no text",
    "was cut": "{} large text files: long documents were cut into several, of about 1 M characters",
    "is not UTF-8": "{} files that are not UTF-8 are left out",
}


def documents(data: Data, passed: Passed | None = None) -> Iterator[str]:
    """Every non-empty document of the source, in a fixed order; the others are counted in ``passed``.

    Raises:
        ConfigError: the source cannot be read, or has no text column of the name ``data.text_field``; a bad
            row, unless ``data.bad_rows`` says to skip it.
    """
    passed = Passed() if passed is None else passed
    for item in _items(data):
        if text := passed.see(data, item):
            yield text
        elif passed.bad_rows and data.bad_rows == "refuse":
            raise _refusal(passed, at_least="")


def check(data: Data) -> None:
    """Read the whole source once, before anything long: raises ConfigError with its bad rows.

    Costs a pass at the speed of reading and parsing, a few percent of tokenising. Not where bad rows are
    skipped.
    """
    if data.bad_rows != "refuse" or not source_of(data.source).checked_first:
        return
    passed, started = Passed(), time.monotonic()
    last_logged = started
    for item in _items(data):
        passed.see(data, item)
        if passed.bad_rows >= ENOUGH:
            break
        if (now := time.monotonic()) - last_logged >= NEWS:
            last_logged = now
            log.info("checked %s documents of data.source in %.0f s", f"{passed.documents:,}", now - started)
    if passed.bad_rows:
        raise _refusal(passed, at_least="at least " if passed.bad_rows >= ENOUGH else "")


def _refusal(passed: Passed, at_least: str) -> ConfigError:
    remedy = (
        f'data.bad_rows = "refuse": data.source has {at_least}{passed.bad_rows} bad rows, and '
        f"{passed.documents:,} documents besides; mend them, leave their files out by data.ignore, or skip "
        "such rows with data.bad_rows=skip"
    )
    return ConfigError([*passed.shown, remedy])


def _items(data: Data) -> Iterator[Item]:
    try:
        yield from source_of(data.source).documents(data)
    except (ConfigError, MemoryError):
        raise
    except OSError as error:
        rule = f"cannot be read: {error}; make it readable, or leave it out by data.ignore"
        raise source_error(data, rule) from error
    except Exception as error:  # datasets and Arrow raise many kinds
        raise source_error(data, f"cannot be read: {type(error).__name__}: {error}") from error
