"""Megatron's MLP over two structured linears, which can keep only the bottlenecks for backward.

Kept for backward, elements a token and rank (f inner width, p ranks, r_1 and r_2 the bottlenecks, sequence parallelism):

    recompute   none         h/p + r_1 (wide) + 2f/p (4f/p when gated, and f/p) + r_2/p
                bottleneck   h/p + r_1/p + r_2/p

With ``bottleneck`` the f-wide activations are rebuilt in backward: z_1 is spread again where the wide one is larger, and one more product
with the first linear's second factor (and with its guide, where that takes part) is done. The same operations in the same order: the
same bits as without.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from sffn_dist.parallel.bottleneck import Column, Row
from sffn_dist.parallel.collectives import Pending
from sffn_dist.parallel.functions import gradients_of, weights_of
from sffn_dist.parallel.linears import StructuredLinear

Recompute = Literal["none", "bottleneck"]


class StructuredMLP(MLP):
    """y = fc2(activation(fc1(x))), with Megatron's own code between the linears.

    ``recompute`` "bottleneck" keeps x and the two bottlenecks for backward, "none" what autograd keeps. Raises ValueError where the two
    linears do not agree on the order of the features between them, or ``recompute`` is asked of linears that have no bottleneck.
    """

    linear_fc1: StructuredLinear
    linear_fc2: StructuredLinear

    def __init__(self, *args: Any, recompute: Recompute = "none", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if recompute not in ("none", "bottleneck"):
            raise ValueError(f"recompute = {recompute!r}: must be none or bottleneck")
        for linear in (self.linear_fc1, self.linear_fc2):
            if not isinstance(linear, StructuredLinear):
                raise ValueError(f"a structured feed-forward layer takes structured linears, not {type(linear).__name__}")
        if self.linear_fc1.layout != self.linear_fc2.layout:
            raise ValueError(
                f"linear_fc1 writes features as {self.linear_fc1.layout}, linear_fc2 reads them as {self.linear_fc2.layout}"
            )
        self.recompute = recompute

    def between(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """What Megatron does between the two linears: bias and activation, fused or not as its config says."""
        done = SimpleNamespace(
            config=self.config,
            activation_func=self.activation_func,
            linear_fc1=lambda y: (y, bias),
            linear_fc2=lambda features: (features, None),
        )
        return MLP.forward(done, y)[0]

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x (S or S/p, batch, h) -> y of the same shape, and the second linear's bias, left to the caller as Megatron does."""
        if self.recompute == "none" or per_token_scale is not None or not torch.is_grad_enabled():
            return super().forward(hidden_states, per_token_scale, **kwargs)
        parameters = (self.linear_fc1.bias, *self.linear_fc1.weights, *self.linear_fc2.weights)
        return _Bottleneck.apply(self, hidden_states, *parameters), self.linear_fc2.bias


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mlp: StructuredMLP, x: Tensor, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        linears = (mlp.linear_fc1, mlp.linear_fc2)
        ctx.mlp, ctx.alphas = mlp, [linear.guide_weight for linear in linears]
        half = len(parameters) // 2
        ctx.shapes = [[parameter.shape for parameter in some] for some in (parameters[:half], parameters[half:])]
        first = weights_of(parameters[:half], ctx.alphas[0])
        second = weights_of(parameters[half:], ctx.alphas[1])
        column, row = _splits(mlp)
        narrow = column.narrow(x, first.first)
        y, wide, _ = column.widen(x, column.exchange.spread(narrow), first, ctx.alphas[0])
        out, _, z = row.forward(mlp.between(y, bias), second, ctx.alphas[1])
        kept = narrow if column.exchange.grows else wide
        ctx.save_for_backward(x, kept, z, bias, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, kept, z, bias, *parameters = ctx.saved_tensors
        half = len(parameters) // 2
        first = weights_of(parameters[:half], ctx.alphas[0])
        second = weights_of(parameters[half:], ctx.alphas[1])
        column, row = _splits(ctx.mlp)
        wide = column.exchange.spread(kept) if column.exchange.grows else Pending(kept)
        begun = row.begin_backward(grads[0], z, second, ctx.alphas[1])
        y, z_wide, whole = column.widen(x, wide, first, ctx.alphas[0])
        with torch.enable_grad():
            leaves = [y.requires_grad_()] + ([] if bias is None else [bias.detach().requires_grad_()])
            features = ctx.mlp.between(*leaves) if bias is not None else ctx.mlp.between(y, None)
        read = row.turned(features.detach()).wait()
        of_row = row.finish_backward(begun, features.detach(), read, second)
        grad_y, *grad_bias = torch.autograd.grad(features, leaves, of_row.x)
        of_column = column.backward(grad_y, x, z_wide, first, ctx.alphas[0], whole)
        return (
            None,
            of_column.x,
            grad_bias[0] if grad_bias else None,
            *gradients_of(of_column, ctx.shapes[0]),
            *gradients_of(of_row, ctx.shapes[1]),
        )


def _splits(mlp: StructuredMLP) -> tuple[Column, Row]:
    column, row = mlp.linear_fc1.split, mlp.linear_fc2.split
    assert isinstance(column, Column)
    assert isinstance(row, Row)
    return column, row
