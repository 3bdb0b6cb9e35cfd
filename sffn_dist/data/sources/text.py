"""Text files -> documents: streamed, decompressed, without a byte order mark, line ends as ``\\n``.

A document ends wherever ``data.document_separator`` stands, and at the end of the file; line ends beside the
separator are no part of it. A file of more than :data:`LARGE` bytes of text is also cut into documents of
about :data:`PART` characters at line ends, so that neither memory nor the split into training and held-out
text hangs on one huge file.
"""

from __future__ import annotations

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from sffn_dist.data.sources.base import BadRow, FileNote, Item
from sffn_dist.data.sources.formats import is_damage, open_file, with_name

LARGE = 16 << 20  # bytes of a text file, decompressed; also characters of a line, beyond which it is cut
PART = 1 << 20  # characters
CHUNK = 1 << 20  # bytes read at a time


def is_large(size: int) -> bool:
    """Whether a text file of ``size`` bytes is cut into parts."""
    return size > LARGE


def text_documents(path: Path, compression: str, separator: str | None) -> Iterator[Item]:
    """The documents of one text file.

    Where the file cannot be read on, the document that is open there is left out with all that follows.
    """
    with open_file(path, compression) as stream:
        reader = TextReader(path, stream)
        raw, size, head = reader.raw_chunks(), 0, []
        for chunk in raw:
            head.append(chunk)
            size += len(chunk)
            if is_large(size):
                break
        splitter = _Splitter(separator, PART if is_large(size) else None)
        for text in reader.decoded(itertools.chain(head, raw)):
            yield from splitter.feed(text)
        if reader.damage:
            yield reader.damage
            return
        yield from splitter.end()
        if not size:
            yield FileNote("holds nothing", str(path))
        if splitter.cuts:
            yield FileNote("was cut", str(path))


class TextReader:
    """A stream of bytes as text. ``damage`` says afterwards where it could not be read on, if anywhere."""

    def __init__(self, path: Path, stream: BinaryIO):
        self.path, self._stream, self._lines = path, stream, 1
        self.damage: BadRow | None = None

    def raw_chunks(self) -> Iterator[bytes]:
        """The bytes, to the end of the file or to the place of its damage."""
        while True:
            try:
                chunk = self._stream.read(CHUNK)
            except Exception as error:
                if not is_damage(error):
                    raise with_name(error, self.path) from None
                self.damage = BadRow(str(self.path), f"is cut off or damaged: {error}", ends_file=True)
                return
            if not chunk:
                return
            yield chunk

    def decoded(self, raw: Iterable[bytes]) -> Iterator[str]:
        """The text of ``raw``, to its end or to the first byte that is no UTF-8."""
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
        try:
            for chunk in raw:
                yield decoder.decode(chunk)
                self._lines += chunk.count(b"\n")
            if not self.damage:
                yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line = self._lines + bytes(error.object)[: error.start].count(b"\n")
            where = f"line {line} of {self.path}"
            self.damage = BadRow(where, f"must be UTF-8 text: {error.reason}", ends_file=True)


class _Splitter:
    """Text as it comes in -> documents. ``cuts``: documents that were cut for their length."""

    def __init__(self, separator: str | None, part: int | None):
        self.cuts = 0
        self._separator, self._part = separator or "", part
        self._text, self._start, self._searched = "", 0, 0
        self._after_separator = self._continued = False

    def feed(self, text: str) -> Iterator[str]:
        self._searched -= self._start
        self._text, self._start = self._text[self._start :] + text, 0
        while self._separator and (at := self._text.find(self._separator, self._searched)) >= 0:
            yield from self._document(at, closed=True)
            self._start = self._searched = at + len(self._separator)
            self._after_separator, self._continued = True, False
        self._searched = max(self._start, len(self._text) - len(self._separator) + 1)
        # a separator may begin in the last characters
        yield from self._parts(len(self._text) - len(self._separator))

    def end(self) -> Iterator[str]:
        """What is left after the last separator, if it is text."""
        if self._text[self._start :].strip() or not self._after_separator:
            yield from self._document(len(self._text), closed=False)

    def _document(self, end: int, closed: bool) -> Iterator[str]:
        yield from self._parts(end)
        text = self._take(end)
        text = text.rstrip("\n") if closed else text
        if text or not self._continued:
            yield text

    def _parts(self, end: int) -> Iterator[str]:
        while self._part and end - self._start >= self._part:
            line_end = self._text.find("\n", self._start + self._part - 1, end) + 1
            if not line_end:
                if end - self._start < LARGE:
                    return
                line_end = self._start + LARGE
            yield self._take(line_end)
            self._continued = True
            self.cuts += 1

    def _take(self, end: int) -> str:
        text = self._text[self._start : end]
        self._start = end
        return text.lstrip("\n") if self._after_separator and not self._continued else text
