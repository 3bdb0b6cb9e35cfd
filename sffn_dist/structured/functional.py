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
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Full fp32 factors of a fresh (outputs, inputs) linear (paper, appendix).

    With ``guide`` also the guide, which starts as the matrix that the factors stand for (section 4).

    ``device``: where singular values are computed and the factors are then, default the generator's. Random
    numbers are the generator's everywhere.
    """
    source = generator.device if generator is not None else torch.device("cpu")

    def gaussian(shape: tuple[int, ...]) -> Tensor:
        numbers = torch.randn(shape, generator=generator, device=source, dtype=torch.float32)
        return numbers if device is None else numbers.to(device)

    factors = ops(structure).draw(inputs, outputs, std, gaussian)
    if guide and not structure.dense:
        factors["guide"] = to_dense(structure, factors)
    return factors
