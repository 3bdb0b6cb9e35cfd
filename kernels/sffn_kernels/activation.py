"""Activations between the two linears of a feed-forward layer, and their derivatives.

Shapes: y (..., F) before, features (..., f) after; F = f, or 2 f for a gated pair, whose gate is the first half.

    gelu      y/2 (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3)))
    gelu_erf  y Phi(y)
    swiglu    silu(gate) up
"""

from __future__ import annotations

from typing import Literal, cast, get_args

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
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    return F.gelu(y, approximate=_APPROXIMATE[activation])


def backward(grad: Tensor, y: Tensor, activation: Activation) -> Tensor:
    """dL/dy (..., F) from dL/dfeatures (..., f), in the place of ``grad`` where that has the size."""
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        out = torch.empty_like(y)
        of_gate, of_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=of_up)
        _ops.silu_backward.grad_input(grad.mul_(up), gate, grad_input=of_gate)
        return out
    return cast(Tensor, _ops.gelu_backward.grad_input(grad, y, approximate=_APPROXIMATE[activation], grad_input=grad))
