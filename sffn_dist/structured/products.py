"""A factor as a linear map in three products without autograd: forward, input gradient, weight gradient.

Whoever splits a linear over ranks writes its backward by hand, to put collectives between these products.

Shapes: x (..., inputs), y (..., outputs), any leading dimensions; the sizes are read from the weight, so a
shard serves as the whole does.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from sffn_kernels import block_diagonal
from torch import Tensor


class Product(Protocol):
    """y = A x for the A that a weight stands for."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """y = A x."""

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """dL/dx = A^T dL/dy."""

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """dL/dweight, summed over tokens; ``weight`` gives the sizes."""


class MatrixProduct:
    """weight (M, N): y = weight x."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad.matmul(weight)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad.flatten(0, -2).t().mm(x.flatten(0, -2))

    # The same, scaled and added within the product itself: none of these reads or writes its output in a pass
    # of its own.

    def add_forward(self, y: Tensor, x: Tensor, weight: Tensor, *, keep: float, scale: float) -> Tensor:
        """keep * y + scale * A x, in the place of y."""
        y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), weight.t(), beta=keep, alpha=scale)
        return y

    def add_input_gradient(self, grad_x: Tensor, grad: Tensor, weight: Tensor, *, scale: float) -> Tensor:
        """grad_x + scale * A^T dL/dy, in the place of grad_x."""
        grad_x = grad_x.contiguous()
        grad_x.view(-1, grad_x.shape[-1]).addmm_(grad.flatten(0, -2), weight, alpha=scale)
        return grad_x

    def scaled_weight_gradient(self, grad: Tensor, x: Tensor, *, scale: float) -> Tensor:
        """scale * dL/dweight."""
        return torch.addmm(x.new_zeros(()), grad.flatten(0, -2).t(), x.flatten(0, -2), beta=0, alpha=scale)


class BlockDiagonalProduct:
    """weight (K, O, I): x grouped by block (k, i) -> y grouped by block (k, o)."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return block_diagonal.product(x.unflatten(-1, (weight.shape[0], -1)), weight).flatten(-2)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return block_diagonal.input_gradient(grad.unflatten(-1, (weight.shape[0], -1)), weight).flatten(-2)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return block_diagonal.weight_gradient(
            grad.unflatten(-1, weight.shape[:2]), x.unflatten(-1, (weight.shape[0], -1))
        )


class InterleavedProduct:
    """weight (K, O, R), Monarch's second factor: z (..., K, R), a row for each block -> y (..., O*K), the
    blocks interleaved (s, l).
    """

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return shaped(block_diagonal.interleaved_product(x, weight), *x.shape[:-2], -1)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return block_diagonal.input_gradient(self._by_block(grad, weight), weight)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return block_diagonal.weight_gradient(self._by_block(grad, weight), x)

    @staticmethod
    def _by_block(grad: Tensor, weight: Tensor) -> Tensor:
        """(..., s*K + l) -> (..., l, s)."""
        return grad.unflatten(-1, (weight.shape[1], weight.shape[0])).transpose(-1, -2)


def shaped(result: Tensor, *shape: int) -> Tensor:
    """A new tensor that nobody else holds, in another shape.

    No view to autograd, which would forbid its users to write into it.
    """
    return torch.ops.aten._unsafe_view(result, shape)


def shuffle(z: Tensor, blocks: int) -> Tensor:
    """Monarch's shuffle: feature r*B + l of z (..., R*B) -> place (l, r) of (..., B, R), a view: row l
    feeds block l.
    """
    return z.unflatten(-1, (-1, blocks)).transpose(-1, -2)


def unshuffle(z: Tensor) -> Tensor:
    """The inverse of :func:`shuffle`: (..., B, R) -> (..., R*B)."""
    return z.transpose(-1, -2).flatten(-2)
