"""Dense, y = W x: a plain matrix as Megatron cuts it. Standard library only."""

from __future__ import annotations

from sffn_dist.structured.cut import Cut, Role
from sffn_dist.structured.structure import Shapes, Structure, StructuredMatrix


class Dense(Structure):
    """``weight`` (M, N)."""

    kind = "dense"
    factors = ("weight",)
    dense = True
    in_modeling_file = True

    def factor_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (outputs, inputs)}

    def bottleneck(self, inputs: int, outputs: int) -> int:
        raise ValueError("a dense matrix has no bottleneck")

    @classmethod
    def from_factor_shapes(cls, shapes: Shapes) -> StructuredMatrix:
        outputs, inputs = shapes["weight"]
        return StructuredMatrix(cls(), outputs, inputs)

    def wide_factor(
        self, role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()
    ) -> tuple[str, Cut]:
        return "weight", self.dense_cut(role, inputs, outputs, gate)
