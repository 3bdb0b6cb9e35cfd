"""A structured feed-forward layer on one rank's shard, from bottleneck to bottleneck.

    y = U z + b        U the first linear's second factor
    a = activation(y)
    out = V a          V the second linear's first factor

Shapes: T tokens, f wide features of this shard, F = f or 2 f (gated), O outputs; L blocks of U, K blocks of
V, R inputs of a block of U.

    first linear          z            U             second linear         V                 out
    low_rank, block_dense (T, R)       (F, R)        low_rank              (O, f)            (T, O)
    block_shuffle         (T, L, R)    (L, F/L, R)   block_dense, _shuffle (K, O/K, f/K)     (T, O)

All are one case: L = 1 and K = 1 where there are no blocks. Of block_shuffle, y stays grouped by the block
that wrote it, feature s*L + l at place (l, s), and the activation writes the features grouped by the block
that reads them, (k, l, j) with s = k*f/(K L) + j. The permutation is in the order of V's columns and of b,
f*O/K elements, and no copy of T*f elements is made for it. It needs K to divide f/L (bottleneck_plain.fits).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sffn_kernels import activation as act
from sffn_kernels import bottleneck_plain as plain
from sffn_kernels import dispatch
from sffn_kernels.activation import Activation
from sffn_kernels.bottleneck_plain import Kept


class BottleneckNeedsGrad(NamedTuple):
    """Whose gradients are wanted; what is frozen costs no product."""

    z: bool = True
    second: bool = True
    bias: bool = True
    first: bool = True


EVERYTHING = BottleneckNeedsGrad()


class BottleneckGradients(NamedTuple):
    """What :func:`backward` returns, each shaped as what it is the gradient of.

    None for what was not wanted.
    """

    z: Tensor | None
    second: Tensor | None
    bias: Tensor | None
    first: Tensor | None


def rebuild(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation) -> Kept:
    """The wide features of all tokens."""

    def by_torch() -> Kept:
        y = plain.widen(z, second, bias)
        return Kept(y, plain.activate(y, first, activation))

    def kernels() -> dispatch.Ways[Kept]:
        from sffn_kernels import bottleneck_triton as ours

        return {
            tile.name: partial(ours.build, z, second, bias, first, activation, tile)
            for tile in ours.tilings(activation)
        }

    return dispatch.run(f"bottleneck_build {activation}", _sizes(z, second, first), z, by_torch, kernels)


def forward(
    z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation, *, keep: bool
) -> tuple[Tensor, Kept | None]:
    """Out (T, O), and with ``keep`` what backward reads of the wide features.

    Without it those of no more than :func:`at_a_time` tokens are ever held; by Triton none, where R fits.
    """
    if keep:
        kept = rebuild(z, second, bias, first, activation)
        return plain.narrow(kept.features, first, _blocks(second)), kept

    def by_torch() -> Tensor:
        parts = [_by_torch(some, second, bias, first, activation) for some in z.split(at_a_time(z.shape[0]))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def kernels() -> dispatch.Ways[Tensor]:
        from sffn_kernels import bottleneck_triton as ours

        made = {
            tile.name: (tile, outputs) for tile, outputs in ours.streams(second, activation) if ours.holds(z)
        }
        return {
            name: partial(ours.through, z, second, bias, first, activation, *tiling)
            for name, tiling in made.items()
        }

    return dispatch.run(
        f"bottleneck_through {activation}", _sizes(z, second, first), z, by_torch, kernels
    ), None


def _by_torch(
    z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation
) -> Tensor:
    return plain.narrow(
        plain.activate(plain.widen(z, second, bias), first, activation), first, _blocks(second)
    )


def _blocks(second: Tensor) -> int:
    return second.shape[0] if second.dim() == 3 else 1


def _sizes(z: Tensor, second: Tensor, first: Tensor) -> tuple[int, ...]:
    return (z.shape[0], *second.shape, *first.shape)


def at_a_time(tokens: int) -> int:
    """Tokens whose wide features are held at once where they are not kept: a 24th, and at least 1,024, which
    fill a GPU.

    At 32% of the parameters everything else that a layer's forward and backward pass holds is 3 T h at most;
    y, a and dL/da of a 24th are 0.5 T h; a dense layer holds 13 T h.
    """
    return max(1024, -(-tokens // 24))


class _Wide(NamedTuple):
    """Of some tokens: features, dL/dy (T, L, F/L), dL/db."""

    features: Tensor
    grad_y: Tensor
    grad_bias: Tensor | None


def _wide_backward(
    grad: Tensor,
    z: Tensor,
    second: Tensor,
    bias: Tensor | None,
    first: Tensor,
    activation: Activation,
    kept: Kept | None,
) -> _Wide:
    """The backward pass through V and the activation, from what was kept or rebuilt."""

    def by_torch() -> _Wide:
        y = kept.y if kept else plain.widen(z, second, bias)
        features = kept.features if kept else plain.activate(y, first, activation)
        grad_y = plain.y_gradient(grad, y, first, activation)
        return _Wide(features, grad_y, None if bias is None else grad_y.sum(0).t().reshape(-1))

    def kernels() -> dispatch.Ways[_Wide]:
        from sffn_kernels import bottleneck_triton as ours

        def way(tile: Any) -> _Wide:
            return _Wide(*ours.wide_backward(grad, z, second, bias, first, activation, kept, tile))

        return {tile.name: partial(way, tile) for tile in ours.BACKWARD}

    op = f"bottleneck_{'backward' if kept else 'rebuild'} {activation}"
    return dispatch.run(op, _sizes(z, second, first), z, by_torch, kernels)


def backward(
    grad: Tensor,
    z: Tensor,
    second: Tensor,
    bias: Tensor | None,
    first: Tensor,
    activation: Activation,
    kept: Kept | None,
    wanted: BottleneckNeedsGrad = EVERYTHING,
    ready: Callable[[Tensor], None] = lambda grad_z: None,
) -> BottleneckGradients:
    """BottleneckGradients from that of out (T, O).

    ``ready`` is called with the gradient of z as soon as that is complete: it may be sent while those of the
    weights are computed. What was not ``kept`` is rebuilt, some tokens at a time; the weights' gradients are
    then summed in fp32.
    """
    tokens = z.shape[0]
    step = max(1, tokens if kept else at_a_time(tokens))
    grad_z = torch.empty_like(z, memory_format=torch.contiguous_format) if wanted.z else None
    sums = _Sums(step < tokens)
    for start in range(0, max(tokens, 1), step):
        part = slice(start, start + step)
        made = _wide_backward(grad[part], z[part], second, bias, first, activation, kept)
        if grad_z is not None:
            plain.z_gradient(made.grad_y, second, grad_z[part])
            if start + step >= tokens:
                ready(grad_z)
        of_second = plain.second_gradient(made.grad_y, z[part], second) if wanted.second else None
        of_first = (
            plain.first_gradient(grad[part], made.features, first, _blocks(second)) if wanted.first else None
        )
        sums.add(of_second, made.grad_bias if wanted.bias else None, of_first)
        del made  # before the next part's are made
    return BottleneckGradients(grad_z, *sums.of(z.dtype))


class _Sums:
    """Gradients of the weights over the parts of the tokens: of a single part as they are, of several in
    fp32 at least.
    """

    def __init__(self, several: bool):
        self.several, self.sums = several, cast(list[Tensor | None], [None, None, None])

    def add(self, *gradients: Tensor | None) -> None:
        for i, gradient in enumerate(gradients):
            held = self.sums[i]
            if held is not None and gradient is not None:
                held.add_(gradient)
            elif gradient is not None:
                self.sums[i] = (
                    gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    if self.several
                    else gradient
                )

    def of(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [None if gradient is None else gradient.to(dtype) for gradient in self.sums]


# ------------------------------------------------------------------------------- the operation, with autograd


def apply(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str) -> Tensor:
    """Out (T, O), differentiable; nothing wide is kept for backward.

    Raises ValueError for an unknown activation, or for blocks that do not fit one another.
    """
    if not plain.fits(second, first, act.checked(activation)):
        raise ValueError(
            f"first {tuple(first.shape)}: its blocks do not hold whole columns of second's "
            f"{tuple(second.shape)}"
        )
    return cast(Tensor, _op(z, second, bias, first, activation))


@torch.library.custom_op("sffn::bottleneck", mutates_args=())
def _op(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str) -> Tensor:
    return forward(z, second, bias, first, act.checked(activation), keep=False)[0]


@torch.library.custom_op("sffn::bottleneck_backward", mutates_args=())
def _backward_op(
    grad: Tensor, z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = backward(grad, z, second, bias, first, act.checked(activation), None)
    made = [z.new_empty(0) if gradient is None else gradient.contiguous() for gradient in found]
    return made[0], made[1], made[2], made[3]


@_op.register_fake
def _(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str) -> Tensor:
    return z.new_empty(z.shape[0], first.shape[:-1].numel())


@_backward_op.register_fake
def _(
    grad: Tensor, z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [z.new_empty(0 if like is None else like.shape) for like in (z, second, bias, first)]
    return made[0], made[1], made[2], made[3]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, second, bias, first, ctx.activation = inputs
    ctx.save_for_backward(z, second, bias, first)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, second, bias, first = ctx.saved_tensors
    of_z, of_second, of_bias, of_first = _backward_op(grad, z, second, bias, first, ctx.activation)
    return of_z, of_second, None if bias is None else of_bias, of_first, None


_op.register_autograd(_differentiate, setup_context=_keep)
