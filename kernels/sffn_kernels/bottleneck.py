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

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from sffn_kernels import activation as act
from sffn_kernels.activation import Activation


class Wanted(NamedTuple):
    """Whose gradients are wanted; what is frozen costs no product."""

    z: bool = True
    second: bool = True
    bias: bool = True
    first: bool = True


EVERYTHING = Wanted()


class Gradients(NamedTuple):
    """What :func:`backward` returns, each shaped as what it is the gradient of; None for what was not wanted."""

    z: Tensor | None
    second: Tensor | None
    bias: Tensor | None
    first: Tensor | None


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


def forward(
    z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation, *, keep: bool
) -> tuple[Tensor, Kept | None]:
    """Out (T, O), and with ``keep`` what backward reads of the wide features.

    Without it those of no more than :func:`at_a_time` tokens are ever held.
    """
    if keep:
        kept = rebuild(z, second, bias, activation)
        return narrow(kept.features, first), kept
    parts = [narrow(act.forward(widen(some, second, bias), activation), first) for some in z.split(at_a_time(z.shape[0]))]
    return parts[0] if len(parts) == 1 else torch.cat(parts), None


def rebuild(z: Tensor, second: Tensor, bias: Tensor | None, activation: Activation) -> Kept:
    """The wide features of all tokens."""
    y = widen(z, second, bias)
    return Kept(y, act.forward(y, activation))


def at_a_time(tokens: int) -> int:
    """Tokens whose wide features are held at once where they are not kept: a sixteenth, and at least 2,048, which fill a GPU.

    At 32% of the parameters everything else that a layer's forward and backward pass holds is 3 T h; y, a and dL/da of a sixteenth are
    0.75 T h; a dense layer holds 14 T h.
    """
    return max(2048, -(-tokens // 16))


def backward(
    grad: Tensor,
    z: Tensor,
    second: Tensor,
    bias: Tensor | None,
    first: Tensor,
    activation: Activation,
    kept: Kept | None,
    wanted: Wanted = EVERYTHING,
    ready: Callable[[Tensor], None] = lambda grad_z: None,
) -> Gradients:
    """Gradients from that of out (T, O).

    ``ready`` is called with the gradient of z as soon as that is complete: it may be sent while those of the weights are computed. What was
    not ``kept`` is rebuilt, some tokens at a time; the weights' gradients are then summed in fp32.
    """
    tokens = z.shape[0]
    step = tokens if kept else at_a_time(tokens)
    grad_z = torch.empty_like(z, memory_format=torch.contiguous_format) if wanted.z else None
    sums = _Sums(step < tokens)
    for start in range(0, max(tokens, 1), max(step, 1)):
        part = slice(start, start + step)
        y, features = kept or rebuild(z[part], second, bias, activation)
        sent = grad[part]
        of_first = _first_gradient(sent, features, first) if wanted.first else None
        grad_y = act.backward(_features_gradient(sent, first, features.shape[1]), y, activation)  # (T, L, F/L)
        if grad_z is not None:
            _z_gradient(grad_y, second, grad_z[part])
            if start + step >= tokens:
                ready(grad_z)
        of_second = _second_gradient(grad_y, z[part], second) if wanted.second else None
        sums.add(of_second, grad_y.sum(0).t().reshape(-1) if wanted.bias and bias is not None else None, of_first)
    return Gradients(grad_z, *sums.of(z.dtype))


class _Sums:
    """Gradients of the weights over the parts of the tokens: of a single part as they are, of several in fp32 at least."""

    def __init__(self, several: bool):
        self.several, self.sums = several, cast(list[Tensor | None], [None, None, None])

    def add(self, *gradients: Tensor | None) -> None:
        for i, gradient in enumerate(gradients):
            held = self.sums[i]
            if held is not None and gradient is not None:
                held.add_(gradient)
            elif gradient is not None:
                self.sums[i] = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) if self.several else gradient

    def of(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [None if gradient is None else gradient.to(dtype) for gradient in self.sums]


def _first_gradient(grad: Tensor, features: Tensor, first: Tensor) -> Tensor:
    """dL/dV, in its own order of columns."""
    if first.dim() == 2:
        return grad.t().mm(features.flatten(1))
    k, blocks = first.shape[0], features.shape[1]
    out = first.new_empty(blocks, k, first.shape[1], first.shape[2] // blocks)
    by_k = grad.unflatten(-1, (k, -1)).permute(1, 2, 0)  # (K, O/K, T)
    for l, read in enumerate(_runs(features, k)):
        torch.bmm(by_k, read, out=out[l])
    return out.permute(1, 2, 3, 0).flatten(2)


def _features_gradient(grad: Tensor, first: Tensor, blocks: int) -> Tensor:
    """dL/da = V^T dL/dout -> (T, L, f/L)."""
    if first.dim() == 2:
        return grad.mm(first).unsqueeze(1)
    k = first.shape[0]
    by_k = grad.unflatten(-1, (k, -1)).transpose(0, 1)  # (K, T, O/K)
    out = grad.new_empty(grad.shape[0], blocks, k * first.shape[2] // blocks)
    for matrices, written in zip(_by_l(first, blocks), _runs(out, k), strict=True):
        torch.bmm(by_k, matrices, out=written)
    return out


def _z_gradient(grad_y: Tensor, second: Tensor, out: Tensor) -> None:
    """dL/dz = U^T dL/dy, into ``out``, shaped as z."""
    if second.dim() == 2:
        torch.mm(grad_y.squeeze(1), second, out=out)
    else:
        torch.bmm(grad_y.transpose(0, 1), second, out=out.transpose(0, 1))


def _second_gradient(grad_y: Tensor, z: Tensor, second: Tensor) -> Tensor:
    """dL/dU."""
    return grad_y.squeeze(1).t().mm(z) if second.dim() == 2 else torch.bmm(grad_y.permute(1, 2, 0), by_block(z))
