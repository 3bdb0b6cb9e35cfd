"""Which structures there are: ``ffn.kind`` -> the class that declares it and the one that computes it.

Imports no torch by itself.

Another structure is two files and a line in ``BUILT_IN``, or :func:`register` called before a config is read.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sffn_dist.structured.block_dense import BlockDense
from sffn_dist.structured.block_shuffle import BlockShuffle
from sffn_dist.structured.dense import Dense
from sffn_dist.structured.low_rank import LowRank
from sffn_dist.structured.structure import Shapes, Structure, StructuredMatrix

if TYPE_CHECKING:
    from sffn_dist.structured.structure_ops import StructureOps

# in this order wherever kinds are listed; the second is imported when something is computed
BUILT_IN: tuple[tuple[type[Structure], str], ...] = (
    (Dense, "sffn_dist.structured.dense_ops:DenseOps"),
    (LowRank, "sffn_dist.structured.low_rank_ops:LowRankOps"),
    (BlockDense, "sffn_dist.structured.block_dense_ops:BlockDenseOps"),
    (BlockShuffle, "sffn_dist.structured.block_shuffle_ops:BlockShuffleOps"),
)
DENSE = Dense.kind

_registered: dict[str, tuple[type[Structure], str | type[StructureOps]]] = {}


def register(structure: type[Structure], ops: str | type[StructureOps]) -> None:
    """Make ``structure.kind`` a value of ``ffn.kind``.

    ``ops`` is a class, or ``module:Class`` to import when it is needed.

    Raises ValueError if the kind is taken.
    """
    if structure.kind in _registered:
        raise ValueError(
            f"kind = {structure.kind!r}: registered already, by {_registered[structure.kind][0].__module__}"
        )
    _registered[structure.kind] = (structure, ops)


for _structure, _ops in BUILT_IN:
    register(_structure, _ops)


def kinds() -> tuple[str, ...]:
    """All kinds, ``dense`` first."""
    return tuple(_registered)


def structured_kinds() -> tuple[str, ...]:
    """All kinds but ``dense``."""
    return tuple(kind for kind, (structure, _) in _registered.items() if not structure.dense)


def structure_class(kind: str) -> type[Structure]:
    """The class that declares a kind; raises ValueError for one that is not registered."""
    if kind not in _registered:
        raise ValueError(f"kind = {kind!r}: must be {listed(kinds())}")
    return _registered[kind][0]


def build_structure(kind: str, rank: int | None = None, blocks: int | None = None) -> Structure:
    """A structure with its settings, which are not checked.

    Raises ValueError for a kind that is not registered.
    """
    return structure_class(kind)(rank, blocks)


@functools.cache
def ops(structure: Structure) -> StructureOps:
    """What computes with factors of this structure."""
    implementation = _registered[structure.kind][1]
    if isinstance(implementation, str):
        implementation = pkgutil.resolve_name(implementation)
    assert not isinstance(implementation, str)
    return implementation(structure)


def from_factor_shapes(shapes: Shapes) -> StructuredMatrix:
    """The structure and matrix that factors of these names and shapes belong to.

    Raises KeyError if they belong to none.
    """
    for structure, _ in _registered.values():
        if set(shapes) == set(structure.factors):
            return structure.from_factor_shapes(shapes)
    for structure, _ in _registered.values():
        missing = [name for name in structure.factors if name not in shapes]
        if len(missing) < len(structure.factors) and set(shapes) < set(structure.factors):
            raise KeyError(f"has no {', '.join(missing)} beside {', '.join(shapes)}, as {structure.kind} has")
    raise KeyError(f"factors {sorted(shapes)} are those of no structure: {listed(kinds())}")


def listed(names: Iterable[str]) -> str:
    """Names as messages list them."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last
