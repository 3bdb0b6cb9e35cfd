"""Dense, computed: y = W x."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sffn_dist.structured.cut import Role
from sffn_dist.structured.products import Product
from sffn_dist.structured.structure_ops import Factors, Gaussian, StructureOps


class DenseOps(StructureOps):
    """``weight`` (M, N), N(0, std) at first."""

    def products(self, role: Role) -> tuple[Product, Product]:
        raise ValueError("a dense matrix has no factors; Megatron's linear computes it")

    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        return F.linear(x, factors["weight"])

    def from_dense(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"weight": matrix.clone()}

    def draw(self, inputs: int, outputs: int, std: float, gaussian: Gaussian) -> dict[str, Tensor]:
        return {"weight": gaussian((outputs, inputs)) * std}
