"""LowRank, y = U (V x): ``down`` V (R, N), ``up`` U (M, R). Standard library only.

Over ranks: column use cuts the rows of ``up``, row use the columns of ``down``, both along f in contiguous
parts.
"""

from __future__ import annotations

from collections.abc import Iterator

from sffn_dist.structured.cut import Cut, Role
from sffn_dist.structured.structure import (
    Shapes,
    Size,
    Structure,
    StructuredMatrix,
    inner_features,
    matrix_rank_problems,
)


class LowRank(Structure):
    """Two dense factors of rank R (paper, section 3.1)."""

    kind = "low_rank"
    settings = ("rank",)
    factors = ("down", "up")
    fused_kernels = True
    in_modeling_file = True

    def factor_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"down": (self.needed_rank, inputs), "up": (outputs, self.needed_rank)}

    def bottleneck(self, inputs: int, outputs: int) -> int:
        return self.needed_rank

    @classmethod
    def from_factor_shapes(cls, shapes: Shapes) -> StructuredMatrix:
        rank, inputs = shapes["down"]
        return StructuredMatrix(cls(rank=rank), shapes["up"][0], inputs)

    def wide_factor(
        self, role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()
    ) -> tuple[str, Cut]:
        layout = self.layout(inner_features(role, inputs, outputs, gate))
        if role == "column":
            return "up", layout.within(gate, (self.needed_rank,))
        return "down", layout.within((self.needed_rank,))

    def size_problems(self, outer: Size, inner: Size, prefix: str = "") -> Iterator[str]:
        yield from matrix_rank_problems(self.rank, outer, inner, prefix)
