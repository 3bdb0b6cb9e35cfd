"""The guided mix of a linear with a dense second factor: y = alpha W x + (1 - alpha) U z + b (paper, section
4).

Shapes: x (T, N), W (M, N) the guide, z (T, R), U (M, R) the second factor, b (M) -> y (T, M).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sffn_kernels import dispatch


def forward(
    x: Tensor, guide: Tensor, z: Tensor, second: Tensor, alpha: float, bias: Tensor | None = None
) -> Tensor:
    """Both products in one accumulator; without autograd.

    By cuBLAS the second one adds to the output of the first.
    """

    def by_torch() -> Tensor:
        if bias is None:
            return z.mm(second.t()).addmm_(x, guide.t(), beta=1 - alpha, alpha=alpha)
        return torch.addmm(bias, z, second.t(), alpha=1 - alpha).addmm_(x, guide.t(), alpha=alpha)

    def kernels() -> dispatch.Ways[Tensor]:
        from sffn_kernels import mix_triton as ours

        return {
            tile.name: partial(ours.mixed, x, guide, z, second, alpha, bias, tile) for tile in ours.CONFIGS
        }

    return dispatch.run("mix", (*x.shape, *second.shape), x, by_torch, kernels)


def apply(
    x: Tensor, guide: Tensor, z: Tensor, second: Tensor, alpha: float, bias: Tensor | None = None
) -> Tensor:
    """y (T, M), differentiable. Raises ValueError for an alpha outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha}: must be within [0, 1]")
    mixed: Tensor = _op(x, guide, z, second, alpha, bias)
    return mixed


@torch.library.custom_op("sffn::mix", mutates_args=())
def _op(x: Tensor, guide: Tensor, z: Tensor, second: Tensor, alpha: float, bias: Tensor | None) -> Tensor:
    return forward(x, guide, z, second, alpha, bias)


@_op.register_fake
def _(x: Tensor, guide: Tensor, z: Tensor, second: Tensor, alpha: float, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], guide.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.alpha, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, guide, z, second = ctx.saved_tensors
    needs = ctx.needs_input_grad
    made: list[Tensor | None] = []
    for read, weight, share, of_read, of_weight in (
        (x, guide, ctx.alpha, *needs[:2]),
        (z, second, 1 - ctx.alpha, *needs[2:4]),
    ):
        made.append(_scaled(grad, weight, share) if of_read else None)
        made.append(_scaled(grad.t(), read, share) if of_weight else None)
    return *made, None, grad.sum(0) if needs[5] else None


def _scaled(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Share times a b, the factor within the product."""
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=share)


_op.register_autograd(_differentiate, setup_context=_keep)
