"""Sources of documents by the form of ``data.source``.

Another one is a file here and a line in :data:`SOURCES`. The first kind that matches is taken.
"""

from __future__ import annotations

from sffn_dist.data.sources.base import Source
from sffn_dist.data.sources.hub import Hub
from sffn_dist.data.sources.local import LocalFiles
from sffn_dist.data.sources.stdlib import StandardLibrary

SOURCES: tuple[Source, ...] = (
    StandardLibrary(),
    Hub(),
    LocalFiles(),  # last: any other text is taken for a path
)


def forms() -> str:
    """What ``data.source`` may be, for messages."""
    *others, last = (source.form for source in SOURCES)
    return f"{', '.join(others)}, or {last}"


def source_of(text: str) -> Source:
    """The kind that ``data.source`` is of."""
    return next(source for source in SOURCES if source.matches(text))
