"""JSON as every record of this package is written: strict, which has no NaN and no infinities.

Those stand as the strings "nan", "inf" and "-inf"; :func:`floats` turns them back. Records of older versions,
with the bare words NaN and Infinity, are still read: ``json.loads`` takes them. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """The text of ``value``; ``indent`` and ``default`` as those of ``json.dumps``.

    Raises TypeError for a value that JSON cannot hold.
    """

    def strict_default(item: Any) -> Any:
        assert default is not None
        return strict(default(item))

    given = strict_default if default else None
    return json.dumps(strict(value), indent=indent, default=given, allow_nan=False)


def strict(value: Any) -> Any:
    """A copy that strict JSON can hold; scalars of numpy or torch become Python's."""
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "nan"
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if not isinstance(value, (str, int, float, type(None))) and hasattr(value, "item"):
        return strict(value.item())
    return value


def floats(value: Any) -> Any:
    """A copy with "nan", "inf" and "-inf" as floats."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [floats(item) for item in value]
    return value
