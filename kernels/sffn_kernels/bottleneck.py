"""A structured feed-forward layer on one rank's shard, from bottleneck to bottleneck; plain torch.

    y = U z + b        U the first linear's second factor
    a = activation(y)
    out = V a          V the second linear's first factor

Shapes: T tokens, f wide features of this shard, F = f or 2 f (gated), O outputs; L blocks of U, K blocks of V, R inputs of a block of U.

    first linear          z            U             second linear         V                 out
    low_rank, block_dense (T, R)       (F, R)        low_rank              (O, f)            (T, O)
    block_shuffle         (T, L, R)    (L, F/L, R)   block_dense, _shuffle (K, O/K, f/K)     (T, O)

All are one case: L = 1 and K = 1 where there are no blocks. The wide features of block_shuffle stay grouped by the block that wrote them,
feature s*L + l at place (l, s), and V reads them there: the permutation is in the order of V's columns and of b, f*O/K elements, and no
copy of T*f elements is made for it. It needs K to divide f/L (:func:`fits`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sffn_kernels import activation as act
from sffn_kernels.activation import Activation


class Gradients(NamedTuple):
    """What :func:`backward` returns, each shaped as what it is the gradient of."""

    z: Tensor
    second: Tensor
    bias: Tensor | None
    first: Tensor


class Kept(NamedTuple):
    """What a forward pass may leave for backward: before and after the activation, (T, L, F/L) and (T, L, f/L)."""

    y: Tensor
    features: Tensor


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
    if first.dim() == 2:
        return features.flatten(1).mm(first.t())
    out = features.new_empty(tokens, *first.shape[:2])
    by_k = out.transpose(0, 1)  # (K, T, O/K)
    for l, (matrices, read) in enumerate(zip(_by_l(first, blocks), _runs(features, first.shape[0]), strict=True)):
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


def forward(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation) -> tuple[Tensor, Kept]:
    """Out (T, O), and what backward may keep."""
    y = widen(z, second, bias)
    features = act.forward(y, activation)
    return narrow(features, first), Kept(y, features)


def backward(
    grad: Tensor, z: Tensor, second: Tensor, first: Tensor, activation: Activation, kept: Kept, *, with_bias: bool
) -> Gradients:
    """Gradients from that of out (T, O)."""
    blocks = second.shape[0] if second.dim() == 3 else 1
    grad_first, grad_features = _narrow_backward(grad, kept.features, first)
    grad_y = act.backward(grad_features, kept.y, activation)  # (T, L, F/L)
    grad_bias = grad_y.sum(0).t().reshape(-1) if with_bias else None
    if second.dim() == 2:
        flat = grad_y.squeeze(1)
        return Gradients(flat.mm(second), flat.t().mm(z), grad_bias, grad_first)
    grad_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    torch.bmm(grad_y.transpose(0, 1), second, out=grad_z.transpose(0, 1))
    assert grad_y.shape[1] == blocks
    return Gradients(grad_z, torch.bmm(grad_y.permute(1, 2, 0), by_block(z)), grad_bias, grad_first)


def _narrow_backward(grad: Tensor, features: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of V, and of the features (T, L, f/L)."""
    if first.dim() == 2:
        return grad.t().mm(features.flatten(1)), grad.mm(first).unsqueeze(1)
    k, blocks = first.shape[0], features.shape[1]
    by_k = grad.unflatten(-1, (k, -1)).transpose(0, 1)  # (K, T, O/K)
    grad_features = torch.empty_like(features)
    of_first = first.new_empty(blocks, k, first.shape[1], first.shape[2] // blocks)
    for l, (matrices, read) in enumerate(zip(_by_l(first, blocks), _runs(features, k), strict=True)):
        torch.bmm(by_k.transpose(1, 2), read, out=of_first[l])
        torch.bmm(by_k, matrices, out=_runs(grad_features, k)[l])
    return of_first.permute(1, 2, 3, 0).flatten(2), grad_features
