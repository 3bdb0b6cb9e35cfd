"""A structured matrix by its structure and factors: apply it, write it out, approximate with it, draw it.

Each calls the structure's own :class:`~sffn_dist.structured.structure_ops.StructureOps`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sffn_dist.structured.registry import ops
from sffn_dist.structured.structure import Structure
from sffn_dist.structured.structure_ops import Factors


def apply(structure: Structure, x: Tensor, factors: Factors) -> Tensor:
    """y = W x for x (..., N), with W the matrix that the factors stand for; differentiable."""
    return ops(structure).apply(x, factors)


def to_dense(structure: Structure, factors: Factors) -> Tensor:
    """The dense matrix W (M, N)."""
    return ops(structure).to_dense(factors)


def from_dense(structure: Structure, matrix: Tensor) -> dict[str, Tensor]:
    """Factors of the nearest matrix of this structure to ``matrix`` (M, N) in Frobenius norm."""
    return ops(structure).from_dense(matrix)


def draw(
    structure: Structure,
    inputs: int,
    outputs: int,
    std: float,
    generator: torch.Generator | None,
    *,
    guide: bool = False,
) -> dict[str, Tensor]:
    """Full fp32 factors of a fresh (outputs, inputs) linear, on the generator's device (paper, appendix).

    With ``guide`` also the guide, which starts as the matrix that the factors stand for (section 4).
    """
    device = generator.device if generator is not None else torch.device("cpu")

    def gaussian(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    factors = ops(structure).draw(inputs, outputs, std, gaussian)
    if guide and not structure.dense:
        factors["guide"] = to_dense(structure, factors)
    return factors
