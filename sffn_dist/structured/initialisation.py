"""Initialisation of the paper (arXiv 2406.16450, appendix).

Dense matrices N(0, std). LowRank: the SVD of a fresh N(0, std) matrix of full size truncated to R, sqrt(S) into each factor. Block
factors, and BlockDense's dense factor: a Gaussian replaced by the nearest orthonormal matrix U V^T, block by block, so that all
singular values are 1. The guide starts as what the factors stand for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sffn_dist.spec.split_table import Structure
from sffn_dist.structured.approximation import from_dense
from sffn_dist.structured.maps import to_dense


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """U V^T of each (..., M, N) matrix U S V^T: the closest one whose singular values are all 1."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def draw(
    structure: Structure, inputs: int, outputs: int, std: float, generator: torch.Generator | None, *, guide: bool = False
) -> dict[str, Tensor]:
    """Full fp32 factors (and ``guide``) of a fresh (outputs, inputs) linear, on the generator's device."""
    device = generator.device if generator is not None else torch.device("cpu")

    def gaussian(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    if structure.kind == "dense":
        return {"weight": gaussian((outputs, inputs)) * std}
    if structure.kind == "low_rank":
        factors = from_dense(structure, gaussian((outputs, inputs)) * std)
    else:
        shapes = structure.factor_shapes(inputs, outputs)
        factors = {name: nearest_orthonormal(gaussian(shape)) for name, shape in shapes.items()}
    if guide:
        factors["guide"] = to_dense(structure, factors)
    return factors
