"""Autograd over bottleneck.py: what a structured linear keeps for backward.

The weights themselves are saved, never a view of them: a saved view would keep ZeRO-3's gathered copy alive until backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sffn_dist.parallel.bottleneck import Column, Gradients, Row, Weights


class ColumnFunction(torch.autograd.Function):
    """(split, alpha, x, first, second[, guide]) -> y."""

    @staticmethod
    def forward(ctx: Any, half: Column, alpha: float | None, x: Tensor, *parameters: Tensor) -> Tensor:
        weights = weights_of(parameters, alpha)
        z = half.exchange.spread(half.narrow(x, weights.first))
        y, wide, _ = half.widen(x, z, weights, alpha)  # of x the rank's own tokens are kept
        ctx.half, ctx.alpha, ctx.parameters = half, alpha, [parameter.shape for parameter in parameters]
        ctx.save_for_backward(x, wide, *(weight for weight in weights if weight is not None))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, z, *saved = ctx.saved_tensors
        gradients = ctx.half.backward(grads[0], x, z, Weights(*saved), ctx.alpha)
        return None, None, gradients.x, *gradients_of(gradients, ctx.parameters)


class RowFunction(torch.autograd.Function):
    """(split, alpha, x, first, second[, guide]) -> y."""

    @staticmethod
    def forward(ctx: Any, half: Row, alpha: float | None, x: Tensor, *parameters: Tensor) -> Tensor:
        weights = weights_of(parameters, alpha)
        y, read, z = half.forward(x, weights, alpha)
        ctx.half, ctx.alpha, ctx.parameters = half, alpha, [parameter.shape for parameter in parameters]
        kept = x if alpha is not None else None  # only the guide reads the features as they came
        ctx.save_for_backward(kept, read, z, *(weight for weight in weights if weight is not None))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, read, z, *saved = ctx.saved_tensors
        weights = Weights(*saved)
        begun = ctx.half.begin_backward(grads[0], z, weights, ctx.alpha)
        gradients = ctx.half.finish_backward(begun, read if x is None else x, read, weights)
        return None, None, gradients.x, *gradients_of(gradients, ctx.parameters)


def weights_of(parameters: Sequence[Tensor], alpha: float | None) -> Weights:
    """The weights that take part, of a linear's [first, second] or [first, second, guide]."""
    return Weights(*(parameters if alpha is not None else parameters[:2]))


def gradients_of(gradients: Gradients, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Gradients in the order of a linear's parameters. An undrawn guide's is zero, not absent: ZeRO-3 would apply the last step's again."""
    found = (gradients.first, gradients.second)
    if len(shapes) == 2:
        return found
    return *found, gradients.first.new_zeros(shapes[2]) if gradients.guide is None else gradients.guide
