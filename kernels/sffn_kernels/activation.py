"""Activations between the two linears of a feed-forward layer, and their derivatives.

Shapes: y (..., F) before, features (..., f) after; F = f, or 2 f for a gated pair, whose gate is the first
half.

    gelu      y/2 (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3)))
    gelu_erf  y Phi(y)
    swiglu    silu(gate) up
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_erf", "swiglu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
_APPROXIMATE = {"gelu": "tanh", "gelu_erf": "none"}
_ops = torch.ops.aten


def checked(activation: str) -> Activation:
    """The name itself. Raises ValueError for any other."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    return activation


def halves(activation: str) -> int:
    """F/f: 2 for a gated pair, else 1."""
    return 2 if activation == "swiglu" else 1


def forward(y: Tensor, activation: Activation) -> Tensor:
    """y (..., F) -> features (..., f)."""
    parts = y.chunk(halves(activation), dim=-1)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    forward_into(parts, activation, out)
    return out


def forward_into(parts: Sequence[Tensor], activation: Activation, out: Tensor) -> None:
    """The same from (y,), or from gate and up, each shaped as ``out``; any strides."""
    if activation == "swiglu":
        _ops.silu.out(parts[0], out=out)
        out.mul_(parts[1])
    else:
        _ops.gelu.out(parts[0], approximate=_APPROXIMATE[activation], out=out)


def backward_into(
    grad: Tensor, parts: Sequence[Tensor], activation: Activation, out: Sequence[Tensor]
) -> None:
    """dL/dparts into ``out``, from dL/dfeatures, which is used up; any strides.

    GELU's ``out`` may be ``grad`` itself.
    """
    if activation == "swiglu":
        torch.mul(grad, F.silu(parts[0]), out=out[1])
        _ops.silu_backward.grad_input(grad.mul_(parts[1]), parts[0], grad_input=out[0])
    else:
        _ops.gelu_backward.grad_input(grad, parts[0], approximate=_APPROXIMATE[activation], grad_input=out[0])
