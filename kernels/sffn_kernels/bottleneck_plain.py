"""The products between two bottlenecks in plain torch, and how the tensors are seen (bottleneck.py has the
formula and the shapes).

BLAS writes into and reads from strided views here, so that no tensor of T*f elements is copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sffn_kernels import activation as act
from sffn_kernels.activation import Activation


class Kept(NamedTuple):
    """What a forward pass may leave for backward: before and after the activation, (T, L, F/L) and (T, K,
    f/K).
    """

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


def activate(y: Tensor, first: Tensor, activation: Activation) -> Tensor:
    """activation(y) -> (T, K, f/K), grouped by the block of V that reads it, in the order of
    :func:`columns`.
    """
    k = first.shape[0] if first.dim() == 3 else 1
    parts = _halves(y, k, activation)
    out = y.new_empty(parts[0].shape)
    act.forward_into(parts, activation, out)
    return out.flatten(2)


def _halves(y: Tensor, k: int, activation: Activation) -> list[Tensor]:
    """y, or gate and up: (T, L, F/L) -> each (T, K, L, f/(K L)), views."""
    return [half.unflatten(-1, (k, -1)).transpose(1, 2) for half in y.chunk(act.halves(activation), dim=-1)]


def _ordered(first: Tensor, blocks: int) -> Tensor:
    """V -> (K, O/K, f/K) with its columns in the order of the features.

    A copy of the weight where L > 1, no BLAS reads every L-th one.
    """
    return columns(first, blocks).flatten(2)


def narrow(features: Tensor, first: Tensor, blocks: int) -> Tensor:
    """Out = V a: (T, K, f/K) -> (T, O)."""
    if first.dim() == 2 and blocks == 1:
        return features.squeeze(1).mm(first.t())
    matrices = _ordered(first, blocks)
    out = features.new_empty(features.shape[0], *matrices.shape[:2])
    torch.bmm(features.transpose(0, 1), matrices.transpose(1, 2), out=out.transpose(0, 1))
    return out.flatten(1)


def first_gradient(grad: Tensor, features: Tensor, first: Tensor, blocks: int) -> Tensor:
    """dL/dV, in its own order of columns."""
    if first.dim() == 2 and blocks == 1:
        return grad.t().mm(features.squeeze(1))
    made = torch.bmm(
        grad.unflatten(-1, (features.shape[1], -1)).permute(1, 2, 0), features.transpose(0, 1)
    )  # (K, O/K, f/K)
    return made.unflatten(-1, (blocks, -1)).transpose(-1, -2).reshape(first.shape)


def y_gradient(grad: Tensor, y: Tensor, first: Tensor, activation: Activation) -> Tensor:
    """dL/dy (T, L, F/L) from that of out: through V, then through the activation."""
    blocks = y.shape[1]
    if first.dim() == 2 and blocks == 1:
        of_features = grad.mm(first).unsqueeze(1)
    else:
        matrices = _ordered(first, blocks)
        of_features = grad.new_empty(grad.shape[0], matrices.shape[0], matrices.shape[2])
        by_k = grad.unflatten(-1, (matrices.shape[0], -1)).transpose(0, 1)  # (K, T, O/K)
        torch.bmm(by_k, matrices, out=of_features.transpose(0, 1))
    k = of_features.shape[1]
    if activation != "swiglu" and 1 in (k, blocks):  # features and y lie alike
        same = of_features.view(y.shape)
        act.backward_into(same, (y,), activation, (same,))
        return same
    out = torch.empty_like(y)
    came = of_features.unflatten(-1, (blocks, -1))  # (T, K, L, f/(K L))
    act.backward_into(came, _halves(y, k, activation), activation, _halves(out, k, activation))
    return out


def z_gradient(grad_y: Tensor, second: Tensor, out: Tensor) -> None:
    """dL/dz = U^T dL/dy, into ``out``, shaped as z."""
    if second.dim() == 2:
        torch.mm(grad_y.squeeze(1), second, out=out)
    else:
        torch.bmm(grad_y.transpose(0, 1), second, out=out.transpose(0, 1))


def second_gradient(grad_y: Tensor, z: Tensor, second: Tensor) -> Tensor:
    """dL/dU."""
    return (
        grad_y.squeeze(1).t().mm(z) if second.dim() == 2 else torch.bmm(grad_y.permute(1, 2, 0), by_block(z))
    )
