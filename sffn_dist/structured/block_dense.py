"""BlockDense, y = U (V_b x): ``block_in`` V (B, R/B, N/B) block-diagonal, ``up`` U (M, R) dense.

Standard library only.

Over ranks the inner features lie as (block, feature in it): blocks are cut first, then what is inside a
block. Column use cuts the rows of ``up``, row use the blocks of ``block_in``, then its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sffn_dist.structured.cut import Cut, Layout, Role
from sffn_dist.structured.structure import (
    Shapes,
    Size,
    Structure,
    StructuredMatrix,
    divisor_problems,
    inner_features,
    matrix_rank_problems,
    shared_block_problems,
)


class BlockDense(Structure):
    """A block-diagonal factor of B blocks before a dense one, of rank R (paper, section 3.1)."""

    kind = "block_dense"
    settings = ("rank", "blocks")
    factors = ("block_in", "up")
    fused_kernels = True
    in_modeling_file = True

    def factor_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        rank, blocks = self.needed_rank, self.needed_blocks
        return {"block_in": (blocks, rank // blocks, inputs // blocks), "up": (outputs, rank)}

    def bottleneck(self, inputs: int, outputs: int) -> int:
        return self.needed_rank

    @classmethod
    def from_factor_shapes(cls, shapes: Shapes) -> StructuredMatrix:
        blocks, rows, columns = shapes["block_in"]
        return StructuredMatrix(cls(rank=blocks * rows, blocks=blocks), shapes["up"][0], blocks * columns)

    def layout(self, features: int) -> Layout:
        return Layout((self.needed_blocks, features // self.needed_blocks), (0, 1))

    def wide_factor(
        self, role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()
    ) -> tuple[str, Cut]:
        if role == "column":
            layout = self.layout(inner_features(role, inputs, outputs, gate))
            return "up", layout.within(gate, (self.needed_rank,))
        return "block_in", Cut(self.factor_shapes(inputs, outputs)["block_in"], (0, 2))

    def setting_problems(self, prefix: str = "") -> Iterator[str]:
        wrong = list(super().setting_problems(prefix))
        yield from wrong
        if not wrong:
            yield from divisor_problems(
                f"{prefix}blocks", self.blocks, Size(f"{prefix}rank", self.needed_rank)
            )

    def size_problems(self, outer: Size, inner: Size, prefix: str = "") -> Iterator[str]:
        yield from matrix_rank_problems(self.rank, outer, inner, prefix)
        yield from divisor_problems(f"{prefix}blocks", self.blocks, outer, inner)

    def layout_problems(self, inner: Size, ranks: Size, prefix: str) -> Iterator[str]:
        blocks = self.needed_blocks
        share = ranks.value // math.gcd(ranks.value, blocks)  # ranks that share a block
        yield from shared_block_problems(
            f"{inner.name} / {prefix}blocks", inner.value // blocks, share, ranks
        )
