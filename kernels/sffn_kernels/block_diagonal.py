"""Block-diagonal products, plain and with Monarch's shuffle folded in.

Shapes: T tokens (any leading dimensions), K blocks, I inputs and O outputs of a block.

:func:`product`, :func:`input_gradient` and :func:`weight_gradient` are the operation without autograd, for callers that write their own
backward. The autograd functions save the weight *itself*, never a view of it: a saved view would keep ZeRO-3's gathered copy of the
parameter alive until backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(x: Tensor, weight: Tensor) -> Tensor:
    """y[t, k, o] = sum_i weight[k, o, i] x[t, k, i]: x (..., K, I) and weight (K, O, I) -> (..., K, O), contiguous."""
    return _by_block(x, weight.transpose(1, 2))


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """dx[t, k, i] = sum_o weight[k, o, i] dy[t, k, o]: dy (..., K, O) -> (..., K, I), contiguous."""
    return _by_block(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """dw[k, o, i] = sum_t dy[t, k, o] x[t, k, i] over all tokens -> (K, O, I)."""
    return torch.bmm(grad.flatten(0, -3).permute(1, 2, 0), x.flatten(0, -3).transpose(0, 1))


def _by_block(x: Tensor, matrices: Tensor) -> Tensor:
    """x (..., K, I) times matrices (K, I, O), written straight into (..., K, O)."""
    out = x.new_empty(*x.shape[:-1], matrices.shape[2])
    torch.bmm(x.flatten(0, -3).transpose(0, 1), matrices, out=out.view(-1, *out.shape[-2:]).transpose(0, 1))
    return out


class _BlockDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # (T, K, I), (K, O, I)
        ctx.save_for_backward(x, weight)
        return product(x, weight)  # (T, K, O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = input_gradient(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """y[t, k, o] = sum_i weight[k, o, i] x[t, k, i].

    Args:
        x: (..., K*I), features grouped by block.
        weight: (K, O, I).

    Returns:
        (..., K*O), features grouped by block.
    """
    blocks, outputs, inputs = weight.shape
    y = _BlockDiagonal.apply(x.reshape(-1, blocks, inputs), weight)
    return y.reshape(*x.shape[:-1], blocks * outputs)


def shuffled_block_diagonal(z: Tensor, weight: Tensor) -> Tensor:
    """Monarch's second factor with both shuffles: y[t, s, l] = sum_r weight[l, s, r] z[t, r, l].

    Args:
        z: (..., R*K), features of the bottleneck; feature r*K + l feeds block l.
        weight: (K, O, R).

    Returns:
        (..., O*K), feature s*K + l from row s of block l.
    """
    blocks, outputs, reduced = weight.shape
    y = _BlockDiagonal.apply(z.reshape(-1, reduced, blocks).transpose(1, 2), weight)  # (T, K, O)
    return y.transpose(1, 2).reshape(*z.shape[:-1], outputs * blocks)
