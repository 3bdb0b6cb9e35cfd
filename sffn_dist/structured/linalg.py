"""Decompositions that several structures use."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left (M, rank), right (rank, N)) with left @ right the best rank-``rank`` approximation
    (Eckart-Young), sqrt(S) in each.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, s.shape[0])
    root = s[:kept].sqrt()
    left = matrix.new_zeros(matrix.shape[0], rank)
    right = matrix.new_zeros(rank, matrix.shape[1])
    left[:, :kept] = u[:, :kept] * root
    right[:kept] = root[:, None] * vh[:kept]
    return left, right


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """U V^T of each (..., M, N) matrix U S V^T: the closest one whose singular values are all 1."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
