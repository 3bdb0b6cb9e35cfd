"""BlockShuffle, y = P^-1(U_b P(V_b x)): ``block_in`` V (B, n/B, N/B), ``block_out`` U (B, M/B, n/B), n =
min(N, M). Standard library only.

Both factors are block-diagonal, with Monarch's shuffle P between them. z[k, q] = sum_p V[k, q, p] x[k*N/B +
p]; z flattened is read as (r, l) with l fastest; y[s*B + l] = sum_r U[l, s, r] z[r*B + l].

Over ranks the inner features lie as (k, s', l) = (B, f/B^2, B), where s = (k, s') and f is the inner width: l
is cut first, then k, then s'. Column use cuts ``block_out`` so; row use cuts ``block_in``, whose block k
reads the features (k, s', l), or exchanges the features for whole blocks k where less is then received.
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
    shared_block_problems,
)


class BlockShuffle(Structure):
    """Two block-diagonal factors of B blocks each, a Monarch matrix (paper, section 3.1)."""

    kind = "block_shuffle"
    settings = ("blocks",)
    factors = ("block_in", "block_out")
    fused_kernels = True
    in_modeling_file = True

    def factor_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        blocks, rows = self.needed_blocks, min(inputs, outputs) // self.needed_blocks
        return {"block_in": (blocks, rows, inputs // blocks), "block_out": (blocks, outputs // blocks, rows)}

    def bottleneck(self, inputs: int, outputs: int) -> int:
        return min(inputs, outputs)

    @classmethod
    def from_factor_shapes(cls, shapes: Shapes) -> StructuredMatrix:
        blocks, _, columns = shapes["block_in"]
        return StructuredMatrix(cls(blocks=blocks), blocks * shapes["block_out"][1], blocks * columns)

    def layout(self, features: int) -> Layout:
        blocks = self.needed_blocks
        if features % blocks**2:
            return Layout((features // blocks, blocks), ())  # cannot be cut: one rank only
        return Layout((blocks, features // blocks**2, blocks), (2, 0, 1))

    def wide_factor(
        self, role: Role, inputs: int, outputs: int, gate: tuple[int, ...] = ()
    ) -> tuple[str, Cut]:
        shapes, layout = (
            self.factor_shapes(inputs, outputs),
            self.layout(inner_features(role, inputs, outputs, gate)),
        )
        if role == "column":
            return "block_out", self._block_out(layout, gate, shapes["block_out"][2])
        return "block_in", self._block_in(layout, shapes["block_in"])

    def _block_out(self, layout: Layout, gate: tuple[int, ...], reduced: int) -> Cut:
        """(B, M/B, n/B): rows (gate, k, s') of block l; features lie as (gate, k, s', l)."""
        if not layout.axes:
            return Cut((layout.view[1], *gate, layout.view[0], reduced), ())
        k, s, blocks = layout.view
        g = len(gate)
        return Cut((blocks, *gate, k, s, reduced), (0, 1 + g, 2 + g))

    def _block_in(self, layout: Layout, shape: tuple[int, ...]) -> Cut:
        """(B, n/B, f/B): block k reads features (k, s', l).

        Two routes to z, h wide; elements received a token and rank, x (p-1)/p. With the features as they lie
        every rank has a part of all of z (of h/q where the blocks k are cut q ways): to sum, h/q. Or the wide
        features are exchanged for whole blocks k first, f/p, and every rank has its h/p of z complete: f/p +
        h/p, which is less where f + h < p h and p divides the blocks (then q = 1).
        """
        if not layout.axes:
            return Cut(shape, ())
        blocks, rows, _ = shape
        width, inner = blocks * rows, math.prod(layout.view)
        return Cut(
            (blocks, rows, layout.view[1], layout.view[2]), (3, 0, 2), many=0, many_from=inner // width + 2
        )

    def size_problems(self, outer: Size, inner: Size, prefix: str = "") -> Iterator[str]:
        yield from divisor_problems(f"{prefix}blocks", self.blocks, outer, inner)

    def layout_problems(self, inner: Size, ranks: Size, prefix: str) -> Iterator[str]:
        blocks = self.needed_blocks
        if inner.value % blocks**2:
            yield (
                f"{prefix}blocks = {blocks}: its square must divide {inner.name} = {inner.value} under "
                "tensor parallelism (the shuffled features of a block must fall into whole blocks of the "
                "next factor)"
            )
            return
        share = ranks.value // math.gcd(ranks.value, blocks)  # ranks that share a block l
        share //= math.gcd(share, blocks)  # and a block k
        yield from shared_block_problems(
            f"{inner.name} / {prefix}blocks^2", inner.value // blocks**2, share, ranks
        )
