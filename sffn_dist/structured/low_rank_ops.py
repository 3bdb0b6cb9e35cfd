"""LowRank, computed: y = U (V x) with ``down`` V (R, N) and ``up`` U (M, R)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sffn_dist.structured.cut import Role
from sffn_dist.structured.linalg import truncated_svd
from sffn_dist.structured.products import MatrixProduct, Product
from sffn_dist.structured.structure_ops import Factors, Gaussian, StructureOps


class LowRankOps(StructureOps):
    """Approximation and first factors are the truncated SVD, sqrt(S) in each (paper, appendix)."""

    def products(self, role: Role) -> tuple[Product, Product]:
        return MatrixProduct(), MatrixProduct()

    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        return F.linear(F.linear(x, factors["down"]), factors["up"])

    def from_dense(self, matrix: Tensor) -> dict[str, Tensor]:
        up, down = truncated_svd(matrix, self.structure.needed_rank)
        return {"down": down, "up": up}

    def draw(self, inputs: int, outputs: int, std: float, gaussian: Gaussian) -> dict[str, Tensor]:
        return self.from_dense(gaussian((outputs, inputs)) * std)
