"""Megatron's MLP over two structured linears, which can keep only the bottlenecks for backward.

Kept for backward, elements a token and rank (f inner width, p ranks, r_1 and r_2 the bottlenecks, sequence parallelism):

    recompute   none         h/p + r_1 (block_shuffle: r_1/B, at least r_1/p) + 2f/p (gated: 5f/p) + r_2/p
                bottleneck   h/p + r_1/p + r_2/p

With ``bottleneck`` the f-wide activations are rebuilt in backward: z_1 is spread again where the wide one is larger, and one more product
with the first linear's second factor (and with its guide, where that takes part) is done. The same operations in the same order: the
same bits as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from sffn_dist.parallel import ledger
from sffn_dist.parallel.bottleneck import Column, Gradients, Row, Wanted, Weights
from sffn_dist.parallel.collectives import Pending
from sffn_dist.parallel.functions import autocast, gradients_of, weights_of
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
        """x (S or S/p, batch, h) -> y of the same shape, and the second linear's bias, left to the caller as Megatron does.

        With ``per_token_scale`` (an expert's) all that autograd keeps is kept, whatever ``recompute`` says.
        """
        if self.recompute == "none" or per_token_scale is not None or not torch.is_grad_enabled():
            return super().forward(hidden_states, per_token_scale, **kwargs)
        for linear in (self.linear_fc1, self.linear_fc2):
            _bring_weights(linear)
        x, weights, off = autocast(hidden_states, [*self.linear_fc1.weights, *self.linear_fc2.weights])
        with off:
            return _Bottleneck.apply(self, x, self.linear_fc1.bias, *weights), self.linear_fc2.bias


def _bring_weights(linear: StructuredLinear) -> None:
    """The linear is not called, so call what Megatron's data parallelism hooked before it: it may still be gathering the weights."""
    for hook in list(linear._forward_pre_hooks.values()):
        if getattr(hook, "__module__", "").startswith("megatron.core.distributed"):
            hook(linear)


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mlp: StructuredMLP, x: Tensor, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.mlp, ctx.alphas = mlp, [linear.guide_weight for linear in (mlp.linear_fc1, mlp.linear_fc2)]
        ctx.half = half = len(mlp.linear_fc1.weights)
        ctx.shapes = [parameter.shape for parameter in parameters]
        first, second = _weights(parameters, half, ctx.alphas)
        column, row = _splits(mlp)
        with ledger.inside(mlp.linear_fc1):
            narrow = column.narrow(x, first.first)
            y, wide, _ = column.widen(x, column.exchange.spread(narrow), first, ctx.alphas[0])
        features = mlp.between(y, bias).to(y.dtype)
        with ledger.inside(mlp.linear_fc2):
            out, _, z = row.forward(features, second, ctx.alphas[1])
        ctx.save_for_backward(x, narrow if column.exchange.grows else wide, z, bias, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, kept, z, bias, *parameters = ctx.saved_tensors
        mlp, alphas, half, needs = ctx.mlp, ctx.alphas, ctx.half, ctx.needs_input_grad
        first, second = _weights(parameters, half, alphas)
        column, row = _splits(mlp)
        of_first = Wanted(needs[1], *needs[3 : 3 + half])
        of_second = Wanted(any(needs[1 : 3 + half]), *needs[3 + half :])
        with ledger.inside(mlp.linear_fc1):
            rising = column.exchange.spread(kept) if column.exchange.grows else Pending(kept)
        with ledger.inside(mlp.linear_fc2):
            begun = row.begin_backward(grads[0], z, second, alphas[1], of_second)
        with ledger.inside(mlp.linear_fc1):
            y, wide, whole = column.widen(x, rising, first, alphas[0])
        with torch.enable_grad():
            leaves = [y.requires_grad_()] + ([] if bias is None else [bias.detach().requires_grad_()])
            features = mlp.between(y, leaves[1] if len(leaves) > 1 else None).to(y.dtype)
        with ledger.inside(mlp.linear_fc2):
            read = row.turned(features.detach()).wait()
            row_gradients = row.finish_backward(begun, features.detach(), read, second, of_second)
        grad_bias, column_gradients = None, Gradients(None, None, None, None)
        if row_gradients.x is not None:
            grad_y, *of_bias = torch.autograd.grad(features, leaves, row_gradients.x)
            grad_bias = of_bias[0] if of_bias else None
            with ledger.inside(mlp.linear_fc1):
                column_gradients = column.backward(grad_y, x, wide, first, alphas[0], of_first, whole)
        of_weights = (
            *gradients_of(column_gradients, ctx.shapes[:half], of_first, x),
            *gradients_of(row_gradients, ctx.shapes[half:], of_second, x),
        )
        return None, column_gradients.x, grad_bias, *of_weights


def _weights(parameters: Sequence[Tensor], half: int, alphas: Sequence[float | None]) -> tuple[Weights, Weights]:
    return weights_of(parameters[:half], alphas[0]), weights_of(parameters[half:], alphas[1])


def _splits(mlp: StructuredMLP) -> tuple[Column, Row]:
    column, row = mlp.linear_fc1.split, mlp.linear_fc2.split
    assert isinstance(column, Column)
    assert isinstance(row, Row)
    return column, row
