"""What a folder of data holds: the files that are read, and everything else, each with the reason.

Links to folders are followed, each folder is read once. Nothing is passed over without a row in
:class:`Listing`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from sffn_dist.data.sources.formats import format_of, looks_like_data


class Listed(NamedTuple):
    """A file that is read; ``relative`` is its path from the source's folder, with ``/``."""

    path: Path
    relative: str
    is_link: bool


class NotRead(NamedTuple):
    """A file or folder that is not read. ``refused``: it looks like data, and nobody said to leave it out."""

    relative: str
    reason: str
    refused: bool


@dataclass
class Listing:
    """What a source's folder holds, in no particular order."""

    files: list[Listed] = field(default_factory=list)
    not_read: list[NotRead] = field(default_factory=list)
    idle_patterns: list[str] = field(default_factory=list)  # of data.ignore, that match nothing

    def refused(self) -> list[NotRead]:
        return [item for item in self.not_read if item.refused]


def list_files(top: Path, ignore: tuple[str, ...] = ()) -> Listing:
    """Everything below ``top``, or ``top`` itself if it is a file.

    ``ignore``: glob patterns of a name or of a path from ``top``; ``*`` also stands for ``/``.
    """
    if not top.is_dir():
        return Listing([Listed(top, top.name, False)], idle_patterns=list(ignore))
    walk = _Walk(ignore)
    walk.folder(top, "")
    while walk.links:  # real folders first: a folder is listed under its own name where it has one
        walk.link(*walk.links.pop(0))
    _drop_links_to_listed_files(walk.listing)
    walk.listing.idle_patterns = [pattern for pattern in ignore if pattern not in walk.used]
    return walk.listing


class _Walk:
    """One pass over a tree; ``links`` are those to folders, still to be followed."""

    def __init__(self, ignore: tuple[str, ...]):
        self.listing, self.links = Listing(), list[tuple[str, str]]()
        self._ignore, self.used = ignore, set[str]()
        self._seen: set[tuple[int, int]] = set()  # device and inode of every folder read

    def folder(self, path: str | os.PathLike[str], relative: str) -> None:
        try:
            if self._is_known(path):
                self._pass_over(relative, "a folder that is read already under another name")
                return
            with os.scandir(path) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._pass_over(relative or ".", f"a folder that cannot be opened ({error.strerror})", True)
            return
        for entry in ordered:
            self._entry(entry, f"{relative}/{entry.name}" if relative else entry.name)

    def link(self, path: str, relative: str) -> None:
        """A link to a folder. One to a folder above it would be read without end."""
        target, parent = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
        if os.path.commonpath([target, parent]) == target:
            self._pass_over(relative, "a link to a folder above it")
        else:
            self.folder(path, relative)

    def _is_known(self, path: str | os.PathLike[str]) -> bool:
        status = os.stat(path)
        key = (status.st_dev, status.st_ino)
        known = key in self._seen
        self._seen.add(key)
        return known

    def _entry(self, entry: os.DirEntry[str], relative: str) -> None:
        matching = [pattern for pattern in self._ignore if _matches(relative, pattern)]
        self.used.update(matching)
        if matching:
            self._pass_over(relative, "data.ignore")
        elif entry.name.startswith("."):
            self._pass_over(relative, "hidden")
        elif entry.is_dir():
            if entry.is_symlink():
                self.links.append((entry.path, relative))
            else:
                self.folder(entry.path, relative)
        elif not entry.is_file():
            kind = "a link to nothing" if entry.is_symlink() else "no regular file"
            self._pass_over(relative, kind, looks_like_data(entry.name))
        elif format_of(entry.name) is None:
            self._pass_over(relative, "not a format that is read", looks_like_data(entry.name))
        else:
            self.listing.files.append(Listed(Path(entry.path), relative, entry.is_symlink()))

    def _pass_over(self, relative: str, reason: str, refused: bool = False) -> None:
        self.listing.not_read.append(NotRead(relative, reason, refused))


def _matches(relative: str, pattern: str) -> bool:
    return fnmatchcase(relative, pattern) or fnmatchcase(relative.rpartition("/")[2], pattern)


def _drop_links_to_listed_files(listing: Listing) -> None:
    """``latest.jsonl`` that links to ``part-9.jsonl`` beside it is the same text, not more of it."""
    if not any(file.is_link for file in listing.files):
        return
    known: set[tuple[int, int]] = set()
    kept = []
    for file in sorted(listing.files, key=lambda file: file.is_link):
        status = file.path.stat()
        key = (status.st_dev, status.st_ino)
        if file.is_link and key in known:
            listing.not_read.append(NotRead(file.relative, "a link to a file that is read already", False))
        else:
            kept.append(file)
        known.add(key)
    listing.files = kept


def by_reason(not_read: Iterable[NotRead], names: int = 3) -> Iterator[str]:
    """A line for each reason: how many there are, and the first names."""
    groups: dict[str, list[str]] = {}
    for item in not_read:
        groups.setdefault(item.reason, []).append(item.relative)
    for reason, members in groups.items():
        more = f", and {len(members) - names} more" if len(members) > names else ""
        yield f"{len(members)} {reason}: {', '.join(sorted(members)[:names])}{more}"
