"""The products between two bottlenecks in plain torch, and how the tensors are seen (bottleneck.py has the formula and the shapes).

BLAS writes into and reads from strided views here, so that no tensor of T*f elements is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sffn_kernels import activation as act
from sffn_kernels.activation import Activation


def fits(second: Tensor, first: Tensor, activation: Activation) -> bool:
    """True if V's blocks hold whole columns of U's: K divides f/L."""
    blocks = second.shape[0] if second.dim() == 3 else 1
    features = second.shape[:-1].numel() // act.halves(activation)
    return features // blocks % (first.shape[0] if first.dim() == 3 else 1) == 0


def grouped(second: Tensor) -> Tensor:
    """U -> (L, F/L, R), a view."""
    return second if second.dim() == 3 else second.unsqueeze(0)


def columns(first: Tensor, blocks: int) -> Tensor:
    """V -> (K, O/K, L, f/(K L)), a view: its columns in the order in which the features are kept."""
    first = first if first.dim() == 3 else first.unsqueeze(0)
    return first.unflatten(-1, (-1, blocks)).transpose(-1, -2)


def by_block(z: Tensor) -> Tensor:
    """Z -> (L, T, R), a view."""
    return z.transpose(0, 1) if z.dim() == 3 else z.unsqueeze(0)


def kept_bias(bias: Tensor, blocks: int) -> Tensor:
    """b -> (L, F/L), in the order in which the features are kept."""
    return bias.view(-1, blocks).t()


def widen(z: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """y = U z + b -> (T, L, F/L)."""
    if second.dim() == 2:
        y = z.mm(second.t()) if bias is None else torch.addmm(bias, z, second.t())
        return y.unsqueeze(1)
    y = z.new_empty(z.shape[0], *second.shape[:2])
    torch.bmm(by_block(z), second.transpose(1, 2), out=y.transpose(0, 1))
    return y if bias is None else y.add_(kept_bias(bias, second.shape[0]))


def narrow(features: Tensor, first: Tensor) -> Tensor:
    """Out = V a: (T, L, f/L) -> (T, O)."""
    tokens, blocks = features.shape[:2]
    if first.dim() == 2 and blocks == 1:
        return features.squeeze(1).mm(first.t())
    matrices_by_l = _by_l(first, blocks)
    out = features.new_empty(tokens, *matrices_by_l.shape[1:3])
    by_k = out.transpose(0, 1)  # (K, T, O/K)
    for l, (matrices, read) in enumerate(zip(matrices_by_l, _runs(features, out.shape[1]), strict=True)):
        if l == 0:
            torch.bmm(read, matrices.transpose(1, 2), out=by_k)
        else:
            by_k.baddbmm_(read, matrices.transpose(1, 2))
    return out.flatten(1)


def _runs(features: Tensor, k: int) -> Tensor:
    """(T, L, f/L) -> (L, K, T, f/(K L)), a view: what block k reads of what block l wrote."""
    return features.unflatten(-1, (k, -1)).permute(1, 2, 0, 3)


def _by_l(first: Tensor, blocks: int) -> Tensor:
    """V (K, O/K, f/K) -> (L, K, O/K, f/(K L)); a copy of the weight where L > 1, since no BLAS reads every L-th column."""
    return columns(first, blocks).permute(2, 0, 1, 3).contiguous()


def first_gradient(grad: Tensor, features: Tensor, first: Tensor) -> Tensor:
    """dL/dV, in its own order of columns."""
    blocks = features.shape[1]
    if first.dim() == 2 and blocks == 1:
        return grad.t().mm(features.squeeze(1))
    k, outputs, _, run = columns(first, blocks).shape
    out = first.new_empty(blocks, k, outputs, run)
    by_k = grad.unflatten(-1, (k, outputs)).permute(1, 2, 0)
    for l, read in enumerate(_runs(features, k)):
        torch.bmm(by_k, read, out=out[l])
    return out.permute(1, 2, 3, 0).reshape(first.shape)


def features_gradient(grad: Tensor, first: Tensor, blocks: int) -> Tensor:
    """dL/da = V^T dL/dout -> (T, L, f/L)."""
    if first.dim() == 2 and blocks == 1:
        return grad.mm(first).unsqueeze(1)
    matrices_by_l = _by_l(first, blocks)
    _, k, outputs, run = matrices_by_l.shape
    by_k = grad.unflatten(-1, (k, outputs)).transpose(0, 1)  # (K, T, O/K)
    out = grad.new_empty(grad.shape[0], blocks, k * run)
    for matrices, written in zip(matrices_by_l, _runs(out, k), strict=True):
        torch.bmm(by_k, matrices, out=written)
    return out


def z_gradient(grad_y: Tensor, second: Tensor, out: Tensor) -> None:
    """dL/dz = U^T dL/dy, into ``out``, shaped as z."""
    if second.dim() == 2:
        torch.mm(grad_y.squeeze(1), second, out=out)
    else:
        torch.bmm(grad_y.transpose(0, 1), second, out=out.transpose(0, 1))


def second_gradient(grad_y: Tensor, z: Tensor, second: Tensor) -> Tensor:
    """dL/dU."""
    return grad_y.squeeze(1).t().mm(z) if second.dim() == 2 else torch.bmm(grad_y.permute(1, 2, 0), by_block(z))
