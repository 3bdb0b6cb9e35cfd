"""BlockDense, computed: y = U (V_b x) with ``block_in`` V (B, R/B, N/B) and ``up`` U (M, R)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sffn_kernels.block_diagonal import block_diagonal
from torch import Tensor

from sffn_dist.structured.cut import Role
from sffn_dist.structured.linalg import truncated_svd
from sffn_dist.structured.products import BlockDiagonalProduct, MatrixProduct, Product
from sffn_dist.structured.structure_ops import Factors, StructureOps


class BlockDenseOps(StructureOps):
    """A row of B independent low-rank blocks: the truncated SVD of each, R/B ranks, is the nearest matrix."""

    def products(self, role: Role) -> tuple[Product, Product]:
        return BlockDiagonalProduct(), MatrixProduct()

    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        return F.linear(block_diagonal(x, factors["block_in"]), factors["up"])

    def from_dense(self, matrix: Tensor) -> dict[str, Tensor]:
        blocks = self.structure.needed_blocks
        pairs = [
            truncated_svd(part, self.structure.needed_rank // blocks) for part in matrix.chunk(blocks, dim=1)
        ]
        return {
            "block_in": torch.stack([right for _, right in pairs]),
            "up": torch.cat([left for left, _ in pairs], dim=1),
        }
