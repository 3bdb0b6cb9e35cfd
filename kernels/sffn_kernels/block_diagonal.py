"""Block-diagonal products, plain and with Monarch's shuffle folded in.

Shapes: T tokens (any leading dimensions), K blocks on this rank, I inputs and O outputs of a block.

The autograd functions save the weight *itself*, never a view of it: a saved view would keep ZeRO-3's gathered copy of the parameter
alive until backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _BlockDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # (T, K, I), (K, O, I)
        ctx.save_for_backward(x, weight)
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)  # (T, K, O)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        by_block = grad.transpose(0, 1)  # (K, T, O)
        grad_x = torch.bmm(by_block, weight).transpose(0, 1) if ctx.needs_input_grad[0] else None
        grad_weight = torch.bmm(by_block.transpose(1, 2), x.transpose(0, 1)) if ctx.needs_input_grad[1] else None
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


def shuffled_block_diagonal(z: Tensor, weight: Tensor, blocks: int, first: int = 0) -> Tensor:
    """Monarch's second factor with both shuffles: y[t, s, l] = sum_r weight[l, s, r] z[t, r*B + first + l].

    Args:
        z: (..., R*B), all features of the bottleneck; feature r*B + l feeds block l.
        weight: (K, O, R), blocks first .. first+K-1 of B = ``blocks``.

    Returns:
        (..., O*K), feature s*K + l from row s of block first + l.
    """
    held, outputs, reduced = weight.shape
    mine = z.reshape(-1, reduced, blocks)[:, :, first : first + held].transpose(1, 2)  # (T, K, R)
    y = _BlockDiagonal.apply(mine, weight)  # (T, K, O)
    return y.transpose(1, 2).reshape(*z.shape[:-1], outputs * held)
