"""``from_dense``: the factors whose product is nearest to a dense matrix in Frobenius norm.

Every structure is a grid of independent low-rank blocks, so the truncated SVD of each block (Eckart-Young) is the optimum:
LowRank one block of rank R; BlockDense B column blocks of rank R/B; BlockShuffle B x B blocks (rows s*B + l of one l, columns of one
input block k), each of as many ranks as bottleneck features join l and k: the Monarch projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sffn_dist.spec.split_table import Structure


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left (M, rank), right (rank, N)) with left @ right the best rank-``rank`` approximation, sqrt(S) in each."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, s.shape[0])
    root = s[:kept].sqrt()
    left = matrix.new_zeros(matrix.shape[0], rank)
    right = matrix.new_zeros(rank, matrix.shape[1])
    left[:, :kept] = u[:, :kept] * root
    right[:kept] = root[:, None] * vh[:kept]
    return left, right


def from_dense(structure: Structure, matrix: Tensor) -> dict[str, Tensor]:
    """Factors of the nearest matrix of this structure to ``matrix`` (M, N)."""
    if structure.kind == "dense":
        return {"weight": matrix.clone()}
    if structure.kind == "low_rank":
        up, down = truncated_svd(matrix, structure.needed_rank)
        return {"down": down, "up": up}
    if structure.kind == "block_dense":
        return _block_dense(structure, matrix)
    return _block_shuffle(structure, matrix)


def _block_dense(structure: Structure, matrix: Tensor) -> dict[str, Tensor]:
    blocks = structure.needed_blocks
    pairs = [truncated_svd(part, structure.needed_rank // blocks) for part in matrix.chunk(blocks, dim=1)]
    return {"block_in": torch.stack([right for _, right in pairs]), "up": torch.cat([left for left, _ in pairs], dim=1)}


def _block_shuffle(structure: Structure, matrix: Tensor) -> dict[str, Tensor]:
    outputs, inputs = matrix.shape
    shapes = structure.factor_shapes(inputs, outputs)
    blocks, per_block, columns = shapes["block_in"]
    block_in, block_out = matrix.new_zeros(shapes["block_in"]), matrix.new_zeros(shapes["block_out"])
    for k in range(blocks):
        for l in range(blocks):
            # bottleneck features of input block k (i // per_block = k) that output block l reads (i % blocks = l)
            joint = torch.tensor([i for i in range(k * per_block, (k + 1) * per_block) if i % blocks == l], dtype=torch.long)
            if joint.numel() == 0:
                continue
            left, right = truncated_svd(matrix[l::blocks, k * columns : (k + 1) * columns], joint.numel())
            block_out[l][:, joint // blocks] = left
            block_in[k][joint - k * per_block] = right
    return {"block_in": block_in, "block_out": block_out}
