"""Sets of times, as lists of (start, end). Standard library only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

Intervals = Sequence[tuple[int, int]]


def union(intervals: Intervals) -> list[tuple[int, int]]:
    """The same time, in order and apart."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def intersection(a: Intervals, b: Intervals) -> list[tuple[int, int]]:
    """Time in both; each in order and apart."""
    found: list[tuple[int, int]] = []
    ends = [end for _, end in b]
    for start, end in a:
        index = bisect_right(ends, start)
        while index < len(b) and b[index][0] < end:
            found.append((max(start, b[index][0]), min(end, b[index][1])))
            index += 1
    return found


def difference(a: Intervals, b: Intervals) -> list[tuple[int, int]]:
    """Time in ``a`` and not in ``b``; each in order and apart."""
    left: list[tuple[int, int]] = []
    ends = [end for _, end in b]
    for start, end in a:
        index = bisect_right(ends, start)
        while index < len(b) and b[index][0] < end:
            if b[index][0] > start:
                left.append((start, b[index][0]))
            start = b[index][1]
            index += 1
        if start < end:
            left.append((start, end))
    return left


def overlap(a: Intervals, b: Intervals) -> int:
    """Length of the time in both."""
    return sum(end - start for start, end in intersection(a, b))
