"""What a structure declares without torch: its settings, factor shapes, cuts over ranks, and the rules that
its sizes keep.

A structure is a subclass of :class:`Structure` in ``<kind>.py``, a subclass of
:class:`~sffn_dist.structured.structure_ops.StructureOps` beside it in ``<kind>_ops.py``, which computes, and
a line in registry.py. Standard library only.

Shapes: h width, f inner width, R rank, B blocks, p tensor-parallel ranks; matrices are (outputs, inputs).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from sffn_dist.structured.cut import Cut, Layout, Role

Shapes = Mapping[str, tuple[int, ...]]
SETTINGS = ("rank", "blocks")  # what structures may have: keys of the config's ffn section


class Size(NamedTuple):
    """A size, and what messages call it: a config key, or words."""

    name: str
    value: int


class StructuredMatrix(NamedTuple):
    """The structure of a matrix, and the sizes of the matrix."""

    structure: Structure
    outputs: int
    inputs: int


@dataclass(frozen=True)
class Structure(abc.ABC):
    """A structure with its settings: ``rank`` R and ``blocks`` B, as far as ``settings`` names them.

    An (outputs, inputs) matrix W of a structure is applied as y = U (V x): the factor applied first makes the
    bottleneck z, the other one makes y (paper, section 3.1). Of the two linears of a feed-forward layer the
    first is column-parallel (h -> f, its outputs are cut), the second row-parallel (f -> h, its inputs are
    cut). Only the factor that touches f is cut; every rank holds the other one whole.
    """

    rank: int | None = None
    blocks: int | None = None

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()  # which of rank and blocks it has
    factors: ClassVar[tuple[str, ...]]  # names, the one applied first before the other
    dense: ClassVar[bool] = False  # a plain matrix: no bottleneck, and nothing to guide
    fused_kernels: ClassVar[bool] = False  # sffn_kernels.bottleneck and .decode know its factors
    # conversion/hf/modeling_sffn.py, which travels with a structured export, knows it
    in_modeling_file: ClassVar[bool] = False

    @property
    def needed_rank(self) -> int:
        assert self.rank is not None, f"{self.kind} needs a rank"
        return self.rank

    @property
    def needed_blocks(self) -> int:
        assert self.blocks is not None, f"{self.kind} needs blocks"
        return self.blocks

    # ------------------------------------------------------------------------------------------------- shapes

    @abc.abstractmethod
    def factor_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Full shapes of the factors of an (outputs, inputs) matrix, in the order of ``factors``."""

    def factor_order(self, role: Role) -> tuple[str, ...]:
        """Names of the factors as a linear of this role applies them."""
        return self.factors

    @abc.abstractmethod
    def bottleneck(self, inputs: int, outputs: int) -> int:
        """Features of z, which lies between the two factors."""

    def multiplications(self, inputs: int, outputs: int) -> int:
        """Multiplications a token in y = W x: one for each weight, unless a structure uses its weights
        more often.
        """
        return sum(math.prod(shape) for shape in self.factor_shapes(inputs, outputs).values())

    @classmethod
    @abc.abstractmethod
    def from_factor_shapes(cls, shapes: Shapes) -> StructuredMatrix:
        """The structure and matrix that factors of these shapes belong to; their names are ``factors``."""

    # --------------------------------------------------------------------------------------------------- cuts

    def layout(self, features: int) -> Layout:
        """How the f inner features of a feed-forward layer lie over ranks: in p contiguous parts, unless
        overridden.
        """
        return Layout((features,), (0,))

    @abc.abstractmethod
    def wide_factor(
        self, role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()
    ) -> tuple[str, Cut]:
        """Name and cut of the factor that touches f.

        ``gate`` is (2,) where ``outputs`` are the two halves of a gated pair.
        """

    def dense_cut(self, role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()) -> Cut:
        """Cut of a dense (outputs, inputs) matrix between the same features: a guide's, as Megatron cuts a
        linear's weight.
        """
        layout = self.layout(inner_features(role, inputs, outputs, gate))
        return layout.within(gate, (inputs,)) if role == "column" else layout.within((outputs,))

    # -------------------------------------------------------------------------------------------------- rules

    def setting_problems(self, prefix: str = "") -> Iterator[str]:
        """What is wrong with ``rank`` and ``blocks`` by themselves.

        ``prefix`` stands before their names in messages.
        """
        for name in SETTINGS:
            value = getattr(self, name)
            if name in self.settings and value is None:
                yield f'{prefix}{name}: missing; {prefix}kind = "{self.kind}" needs it'
            elif name not in self.settings and value is not None:
                yield f'{prefix}{name} = {value}: {prefix}kind = "{self.kind}" takes no {name}; leave it out'
            elif value is not None and (not isinstance(value, int) or value < 1):
                yield f"{prefix}{name} = {value!r}: must be a positive whole number"

    def size_problems(self, outer: Size, inner: Size, prefix: str = "") -> Iterator[str]:
        """Why no matrix between ``outer`` (h) and ``inner`` (f) features has this structure.

        A missing setting breaks no rule here.
        """
        yield from ()

    def tensor_parallel_problems(self, inner: Size, ranks: Size, prefix: str = "") -> Iterator[str]:
        """Why ``inner`` features cannot be split over ``ranks`` tensor-parallel ranks."""
        if ranks.value == 1:
            return
        if inner.value % ranks.value:
            yield f"{inner.name} = {inner.value}: must be divisible by {ranks.name} = {ranks.value}"
        if all(getattr(self, name) is not None for name in self.settings):
            yield from self.layout_problems(inner, ranks, prefix)

    def layout_problems(self, inner: Size, ranks: Size, prefix: str) -> Iterator[str]:
        """Those of the structure's own layout. Called when all settings are there."""
        try:
            self.layout(inner.value).within().ways(ranks.value)
        except ValueError as error:
            if inner.value % ranks.value == 0:
                yield f'{inner.name} = {inner.value}: {prefix}kind = "{self.kind}" cannot split it: {error}'


def inner_features(role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()) -> int:
    """The f of a linear of this role."""
    if role == "row":
        return inputs
    return outputs // math.prod(gate)


def divisor_problems(key: str, value: int | None, *sizes: Size) -> Iterator[str]:
    """A message for each size that ``value`` does not divide."""
    for size in sizes:
        if value is not None and size.value % value:
            yield f"{key} = {value}: must divide {size.name} = {size.value}"


def matrix_rank_problems(rank: int | None, outer: Size, inner: Size, prefix: str) -> Iterator[str]:
    """A matrix has no higher rank than its smaller side."""
    smaller = min(outer.value, inner.value)
    if rank is not None and rank > smaller:
        yield f"{prefix}rank = {rank}: must not exceed min({outer.name}, {inner.name}) = {smaller}"


def shared_block_problems(key: str, value: int, ranks_per_block: int, ranks: Size) -> Iterator[str]:
    """``ranks_per_block`` ranks each take an equal part of a block's ``value`` features."""
    if value % ranks_per_block:
        yield f"{key} = {value}: must be divisible by {ranks_per_block}, since {ranks.name} = {ranks.value}"


def refuse(problems: Iterable[str]) -> None:
    """Raise ValueError with all of the problems, if there are any."""
    if texts := list(problems):
        raise ValueError("; ".join(texts))
