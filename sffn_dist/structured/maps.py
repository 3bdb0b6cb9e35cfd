"""The three structures as maps of two factors (paper, section 3.1), and their meaning ``to_dense``.

    LowRank       y = U (V x)                     down (R, N), up (M, R)
    BlockDense    y = U (V_b x)                   block_in (B, R/B, N/B), up (M, R)
    BlockShuffle  y = f^-1(U_b f(V_b x))          block_in (B, n/B, N/B), block_out (B, M/B, n/B), n = min(N, M)

In index form BlockShuffle is z[k, q] = sum_p V[k, q, p] x[k*N/B + p]; z flattened is read as (r, l) with l fastest;
y[s*B + l] = sum_r U[l, s, r] z[r*B + l].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from sffn_kernels.block_diagonal import block_diagonal, shuffled_block_diagonal
from torch import Tensor

from sffn_dist.spec.split_table import Structure

Factors = Mapping[str, Tensor]


def first(structure: Structure, x: Tensor, factors: Factors) -> Tensor:
    """x (..., N) -> z (..., bottleneck)."""
    if structure.kind == "low_rank":
        return F.linear(x, factors["down"])
    return block_diagonal(x, factors["block_in"])


def second(structure: Structure, z: Tensor, factors: Factors) -> Tensor:
    """z (..., bottleneck) -> y (..., M)."""
    if structure.kind == "block_shuffle":
        return shuffled_block_diagonal(z, factors["block_out"])
    return F.linear(z, factors["up"])


def apply(structure: Structure, x: Tensor, factors: Factors) -> Tensor:
    """y = W x for x (..., N), with W the matrix that the factors stand for."""
    if structure.kind == "dense":
        return F.linear(x, factors["weight"])
    return second(structure, first(structure, x, factors), factors)


def to_dense(structure: Structure, factors: Factors) -> Tensor:
    """The dense matrix (M, N): the map applied to the identity."""
    some = factors[{"dense": "weight", "low_rank": "down"}.get(structure.kind, "block_in")]  # what x meets first
    inputs = some.shape[1] if some.dim() == 2 else some.shape[0] * some.shape[2]
    identity = torch.eye(inputs, dtype=some.dtype, device=some.device)
    return apply(structure, identity, factors).t().contiguous()
