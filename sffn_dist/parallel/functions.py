"""Autograd over split_linear.py: what a structured linear keeps for backward.

The weights themselves are saved, never a view of them: a saved view would keep ZeRO-3's gathered copy alive
until backward. Backward is written by hand with collectives in it, so it has no derivative of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sffn_dist.parallel.linear_weights import LinearGradients, LinearWeights, NeedsGrad
from sffn_dist.parallel.split_linear import ColumnSplit, RowSplit


class ColumnFunction(torch.autograd.Function):
    """(split, alpha, x, first, second[, guide]) -> y."""

    @staticmethod
    def forward(ctx: Any, split: ColumnSplit, alpha: float | None, x: Tensor, *parameters: Tensor) -> Tensor:
        weights = weights_of(parameters, alpha)
        z = split.exchange.spread(split.narrow(x, weights.first))
        y, wide, _ = split.widen(x, z, weights, alpha)  # of x the rank's own tokens are kept
        ctx.split, ctx.alpha, ctx.shapes = split, alpha, [parameter.shape for parameter in parameters]
        ctx.save_for_backward(x, wide, *(weight for weight in weights if weight is not None))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, z, *saved = ctx.saved_tensors
        wanted = NeedsGrad(*ctx.needs_input_grad[2:])
        gradients = ctx.split.backward(grads[0], x, z, LinearWeights(*saved), ctx.alpha, wanted)
        return None, None, gradients.x, *gradients_of(gradients, ctx.shapes, wanted, x)


class RowFunction(torch.autograd.Function):
    """(split, alpha, x, first, second[, guide]) -> y."""

    @staticmethod
    def forward(ctx: Any, split: RowSplit, alpha: float | None, x: Tensor, *parameters: Tensor) -> Tensor:
        weights = weights_of(parameters, alpha)
        y, read, z = split.forward(x, weights, alpha)
        ctx.split, ctx.alpha, ctx.shapes = split, alpha, [parameter.shape for parameter in parameters]
        kept = x if alpha is not None else None  # only the guide reads the features as they came
        ctx.save_for_backward(kept, read, z, *(weight for weight in weights if weight is not None))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, read, z, *saved = ctx.saved_tensors
        weights, wanted = LinearWeights(*saved), NeedsGrad(*ctx.needs_input_grad[2:])
        pending = ctx.split.begin_backward(grads[0], z, weights, ctx.alpha, wanted)
        gradients = ctx.split.finish_backward(pending, read if x is None else x, read, weights, wanted)
        return None, None, gradients.x, *gradients_of(gradients, ctx.shapes, wanted, z)


def weights_of(parameters: Sequence[Tensor], alpha: float | None) -> LinearWeights:
    """The weights that take part, of a linear's [first, second] or [first, second, guide]."""
    return LinearWeights(*(parameters if alpha is not None else parameters[:2]))


def gradients_of(
    gradients: LinearGradients, shapes: Sequence[torch.Size], wanted: NeedsGrad, like: Tensor
) -> tuple[Tensor | None, ...]:
    """LinearGradients in the order of a linear's parameters.

    An undrawn guide's is zero, not absent: ZeRO-3 would apply the last step's again.
    """
    factor_gradients = (gradients.first, gradients.second)
    if len(shapes) == 2:
        return factor_gradients
    undrawn = gradients.guide is None and wanted.guide
    return *factor_gradients, like.new_zeros(()).expand(shapes[2]) if undrawn else gradients.guide


def autocast(
    x: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], contextlib.AbstractContextManager[Any]]:
    """Under torch.autocast, x and weights in its precision, as it casts a linear's, and a context in which
    it is off.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, list(weights), contextlib.nullcontext()
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), [weight.to(dtype) for weight in weights], torch.autocast(kind, enabled=False)
