"""What a structure computes: y = W x as two products, its dense meaning, its best approximation, its
initialisation. Single device.

One subclass of :class:`StructureOps` in ``<kind>_ops.py`` for each structure, beside what it declares in
``<kind>.py``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sffn_dist.structured.cut import Role
from sffn_dist.structured.linalg import nearest_orthonormal
from sffn_dist.structured.products import Product
from sffn_dist.structured.structure import Structure

Factors = Mapping[str, Tensor]
Gaussian = Callable[[tuple[int, ...]], Tensor]  # shape -> N(0, 1)


class StructureOps(abc.ABC):
    """The computation of one structure; ``structure`` has the settings, factors come by name."""

    # block l of the second factor reads the features r*B + l of z, as Monarch does, in place of z as it is
    shuffled: ClassVar[bool] = False

    def __init__(self, structure: Structure):
        self.structure = structure

    @abc.abstractmethod
    def products(self, role: Role) -> tuple[Product, Product]:
        """The factors as a linear of this role applies them, each as a product without autograd."""

    @abc.abstractmethod
    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        """y = W x for x (..., N), differentiable."""

    def to_dense(self, factors: Factors) -> Tensor:
        """W (M, N): the map applied to the identity."""
        any_factor = next(iter(factors.values()))
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        identity = torch.eye(
            self.structure.from_factor_shapes(shapes).inputs, dtype=any_factor.dtype, device=any_factor.device
        )
        return self.apply(identity, factors).t().contiguous()

    @abc.abstractmethod
    def from_dense(self, matrix: Tensor) -> dict[str, Tensor]:
        """Factors of the nearest matrix of this structure to ``matrix`` (M, N) in Frobenius norm."""

    def draw(self, inputs: int, outputs: int, std: float, gaussian: Gaussian) -> dict[str, Tensor]:
        """First factors (paper, appendix): each block a Gaussian replaced by the nearest orthonormal matrix,
        unless overridden.

        ``std`` is that of a dense matrix's entries.
        """
        shapes = self.structure.factor_shapes(inputs, outputs)
        return {name: nearest_orthonormal(gaussian(shape)) for name, shape in shapes.items()}
