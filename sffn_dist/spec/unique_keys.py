"""JSON that a user writes. Standard library only.

Python keeps the last of two equal keys and drops the first without a word; here that is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


class RepeatedKeyError(ValueError):
    """An object holds a key twice; the message names all of them, by their path."""


class _Object(dict[str, Any]):
    """An object as it was written."""

    repeated: tuple[str, ...] = ()


def loads(text: str) -> Any:
    """What ``text`` says.

    Raises:
        RepeatedKeyError: an object in it holds a key twice.
        ValueError, RecursionError: it is not JSON.
    """
    tree = json.loads(text, object_pairs_hook=_object)
    if repeated := list(_repeated(tree, "")):
        raise RepeatedKeyError(f"holds {', '.join(repeated)} twice in one object; leave one out")
    return tree


def _object(pairs: Iterable[tuple[str, Any]]) -> _Object:
    written, repeated = _Object(), []
    for key, value in pairs:
        if key in written:
            repeated.append(key)
            # both are looked through for more
            written[f"{key} (first)"] = written[key]
        written[key] = value
    written.repeated = tuple(repeated)
    return written


def _repeated(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, _Object):
        yield from (f"{prefix}{key}" for key in dict.fromkeys(value.repeated))
        for key, item in value.items():
            yield from _repeated(item, f"{prefix}{key}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated(item, f"{prefix}{index}.")
