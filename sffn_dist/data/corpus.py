"""Source -> documents, whatever kind the source is of (data/sources/)."""

from __future__ import annotations

from collections.abc import Iterator

from sffn_dist.data.sources import source_of
from sffn_dist.data.sources.base import source_error
from sffn_dist.spec.config import ConfigError, Data


def documents(data: Data) -> Iterator[str]:
    """Every non-empty document of the source, in a fixed order.

    Raises:
        ConfigError: the source cannot be read, or has no text column of the name ``data.text_field``.
    """
    try:
        for text in source_of(data.source).documents(data):
            if text:
                yield text
    except (ConfigError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise source_error(data, f"must be UTF-8 text: {error}") from None
    except Exception as error:  # datasets and Arrow raise many kinds
        raise source_error(data, f"cannot be read: {type(error).__name__}: {error}") from error
