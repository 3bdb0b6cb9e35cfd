"""BlockShuffle, computed: y = P^-1(U_b P(V_b x)) with ``block_in`` V (B, n/B, N/B) and ``block_out`` U (B,
M/B, n/B).
"""

from __future__ import annotations

import torch
from sffn_kernels.block_diagonal import block_diagonal, shuffled_block_diagonal
from torch import Tensor

from sffn_dist.structured.cut import Role
from sffn_dist.structured.linalg import truncated_svd
from sffn_dist.structured.products import BlockDiagonalProduct, InterleavedProduct, Product
from sffn_dist.structured.structure_ops import Factors, StructureOps


class BlockShuffleOps(StructureOps):
    """A grid of B x B independent low-rank blocks: rows s*B + l of one l, columns of one input block k.

    Each has as many ranks as bottleneck features join l and k, and the truncated SVD of each is the nearest
    matrix: the Monarch projection.
    """

    shuffled = True

    def products(self, role: Role) -> tuple[Product, Product]:
        return BlockDiagonalProduct(), InterleavedProduct()

    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        return shuffled_block_diagonal(block_diagonal(x, factors["block_in"]), factors["block_out"])

    def from_dense(self, matrix: Tensor) -> dict[str, Tensor]:
        outputs, inputs = matrix.shape
        shapes = self.structure.factor_shapes(inputs, outputs)
        blocks, per_block, columns = shapes["block_in"]
        block_in, block_out = matrix.new_zeros(shapes["block_in"]), matrix.new_zeros(shapes["block_out"])
        for k in range(blocks):
            for l in range(blocks):
                # bottleneck features of input block k (i // per_block = k) that output block l reads (i %
                # blocks = l)
                joint = torch.tensor(
                    [i for i in range(k * per_block, (k + 1) * per_block) if i % blocks == l],
                    dtype=torch.long,
                )
                if joint.numel() == 0:
                    continue
                left, right = truncated_svd(matrix[l::blocks, k * columns : (k + 1) * columns], joint.numel())
                block_out[l][:, joint // blocks] = left
                block_in[k][joint - k * per_block] = right
        return {"block_in": block_in, "block_out": block_out}
