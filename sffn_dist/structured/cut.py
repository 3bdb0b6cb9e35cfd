"""How a tensor is cut over tensor-parallel ranks. Standard library only.

A cut names axes of a *view* of the full tensor. BlockShuffle shows why: its output feature s*B + l belongs to
block l, so a cut over blocks is contiguous in the factor (B, M/B, n/B) and strided in the activation, the
bias and the guide. With the inner features seen as (k, s', l) = (B, f/B^2, B), one layout serves them all:
cut l first, then (more ranks than blocks) k, then s'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal["column", "row"]


@dataclass(frozen=True)
class Cut:
    """Split ``view`` (which refines a tensor's shape) along ``axes``: each in turn takes as many ways as
    divide it.

    ``many`` names one axis that is cut instead, into p parts, where it can be and p is at least
    ``many_from``.
    """

    view: tuple[int, ...]
    axes: tuple[int, ...]
    many: int | None = None
    many_from: int = 0

    def exchanges_features(self, p: int) -> bool:
        """Whether p ranks cut axis ``many``."""
        return self.many is not None and p >= max(2, self.many_from) and self.view[self.many] % p == 0

    def ways(self, p: int) -> tuple[tuple[int, int], ...]:
        """(axis, ways) pairs whose ways multiply to p; raises ValueError if p does not fit."""
        left, pairs = p, []
        for axis in (self.many,) if self.exchanges_features(p) and self.many is not None else self.axes:
            ways = math.gcd(self.view[axis], left)
            left //= ways
            pairs.append((axis, ways))
        if left != 1:
            raise ValueError(f"{p} tensor-parallel ranks do not divide axes {self.axes} of {self.view}")
        return tuple(pairs)

    def local_view(self, p: int) -> tuple[int, ...]:
        """The view's sizes on one of p ranks; raises ValueError if p does not fit."""
        view = list(self.view)
        for axis, ways in self.ways(p):
            view[axis] //= ways
        return tuple(view)

    def starts(self, p: int, rank: int) -> tuple[tuple[int, int, int], ...]:
        """(axis, start, length) of ``rank``'s part; the first axis is the slowest digit of the rank."""
        if not 0 <= rank < p:
            raise ValueError(f"rank {rank} of {p}")
        parts, below = [], p
        for axis, ways in self.ways(p):
            below //= ways
            length = self.view[axis] // ways
            parts.append((axis, rank // below % ways * length, length))
        return tuple(parts)


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor: its full shape and its cut (None: every tensor-parallel rank holds all of it)."""

    shape: tuple[int, ...]
    cut: Cut | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def _dim_of_axes(self) -> tuple[int, ...]:
        """For each axis of the cut's view, the dimension of ``shape`` that it belongs to."""
        assert self.cut is not None
        owners, dim, covered = [], 0, 1
        for size in self.cut.view:
            while covered * size > self.shape[dim]:
                dim, covered = dim + 1, 1
            covered *= size
            owners.append(dim)
        return tuple(owners)

    def local_shape(self, p: int) -> tuple[int, ...]:
        """The shape that one of p ranks holds; raises ValueError if p does not fit."""
        if self.cut is None or p == 1:
            return self.shape
        sizes = [1] * len(self.shape)
        for owner, size in zip(self._dim_of_axes(), self.cut.local_view(p), strict=True):
            sizes[owner] *= size
        return tuple(sizes)

    def partition_dim(self, p: int) -> int:
        """The dimension cut first (Megatron's ``partition_dim``); -1 if replicated."""
        if self.cut is None or not self.cut.axes:
            return -1
        owners = self._dim_of_axes()
        return next((owners[axis] for axis, ways in self.cut.ways(p) if ways > 1), owners[self.cut.axes[0]])

    def block_groups(self, p: int) -> tuple[int, ...]:
        """For each of p ranks, which group of blocks of a block factor (blocks, outputs, inputs) it holds.

        All 0 for a matrix.
        """
        if self.cut is None or len(self.shape) < 3 or p == 1:
            return (0,) * p
        parts = [
            {axis: (start, length) for axis, start, length in self.cut.starts(p, rank)} for rank in range(p)
        ]
        return tuple(part[0][0] // part[0][1] if 0 in part else 0 for part in parts)


@dataclass(frozen=True)
class Layout:
    """How the inner features f lie over ranks: the layout a first linear writes and a second one reads."""

    view: tuple[int, ...]
    axes: tuple[int, ...]

    def within(self, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Cut:
        return Cut((*before, *self.view, *after), tuple(axis + len(before) for axis in self.axes))
