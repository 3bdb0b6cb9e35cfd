"""Megatron's MLP over two structured linears, which can keep only the bottlenecks for backward.

Kept for backward, elements a token and rank (f inner width, p ranks, r_1 and r_2 the bottlenecks, sequence
parallelism):

    recompute   none         h/p + r_1 (block_shuffle: r_1/B, at least r_1/p) + 2f/p (gated: 3f/p, with a
                             guide 5f/p) + r_2/p
                bottleneck   h/p + r_1/p + r_2/p

With ``bottleneck`` the f-wide activations are rebuilt in backward: z_1 is spread again where the wide one is
larger, and one more product with the first linear's second factor (and with its guide, where that takes part)
is done.

From wide bottleneck to wide bottleneck a rank needs nobody: second factor, bias, activation and the next
first factor are one operation on its shard, sffn_kernels.bottleneck. Where a guide takes part, the activation
is none of that operation's, or features change ranks between the linears (structured/cut.py, Cut.many), they
are operations of their own, with Megatron's code between the linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from megatron.core.transformer.mlp import MLP
from sffn_kernels import bottleneck as shard
from sffn_kernels import decode
from sffn_kernels.activation import Activation
from sffn_kernels.bottleneck import BottleneckGradients, BottleneckNeedsGrad
from sffn_kernels.bottleneck_plain import Kept, fits
from torch import Tensor
from torch.autograd.function import once_differentiable

from sffn_dist.parallel import ledger
from sffn_dist.parallel.activation_name import activation_of
from sffn_dist.parallel.collectives import Pending
from sffn_dist.parallel.functions import autocast, gradients_of, weights_of
from sffn_dist.parallel.linear_hooks import is_unhooked, run_weight_hooks
from sffn_dist.parallel.linear_weights import LinearGradients, LinearWeights, NeedsGrad
from sffn_dist.parallel.linears import StructuredLinear
from sffn_dist.parallel.split_linear import ColumnSplit, RowSplit, wait_for

Recompute = Literal["none", "bottleneck"]


class StructuredMLP(MLP):
    """y = fc2(activation(fc1(x))).

    ``recompute`` "bottleneck" keeps x and the two bottlenecks for backward, "none" what autograd keeps.
    Raises ValueError where the two linears do not agree on the order of the features between them, or
    ``recompute`` is asked of linears that have no bottleneck.
    """

    linear_fc1: StructuredLinear
    linear_fc2: StructuredLinear

    def __init__(self, *args: Any, recompute: Recompute = "none", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if recompute not in ("none", "bottleneck"):
            raise ValueError(f"recompute = {recompute!r}: must be none or bottleneck")
        for linear in (self.linear_fc1, self.linear_fc2):
            if not isinstance(linear, StructuredLinear):
                raise ValueError(
                    f"a structured feed-forward layer takes structured linears, not {type(linear).__name__}"
                )
        if self.linear_fc1.layout != self.linear_fc2.layout:
            raise ValueError(
                f"linear_fc1 writes features as {self.linear_fc1.layout}, linear_fc2 reads them as "
                f"{self.linear_fc2.layout}"
            )
        self.recompute = recompute

    def between(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """What Megatron does between the two linears: bias and activation, fused or not as its config
        says.
        """
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
        """x (S or S/p, batch, h) -> y of the same shape, and the second linear's bias, left to the caller as
        Megatron does.

        With ``per_token_scale`` (an expert's) all that autograd keeps is kept, whatever ``recompute`` says.
        """
        activation = self._one_operation() if per_token_scale is None else None
        keeps = per_token_scale is not None or self.recompute == "none" or not torch.is_grad_enabled()
        if activation is None and keeps:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        for linear in (self.linear_fc1, self.linear_fc2):
            run_weight_hooks(linear)
        x, weights, off = autocast(hidden_states, [*self.linear_fc1.weights, *self.linear_fc2.weights])
        bias = self.linear_fc1.bias
        with off:
            if activation is None:
                return _Bottleneck.apply(self, x, bias, *weights), self.linear_fc2.bias
            if self._few(x):
                return self._decode(x, bias, weights, activation), self.linear_fc2.bias
            keep = keeps and torch.is_grad_enabled()
            return _Direct.apply(self, activation, keep, x, bias, *weights), self.linear_fc2.bias

    def _few(self, x: Tensor) -> bool:
        """Whether these are the tokens of a decoding step, on one rank."""
        alone = self.linear_fc1.ranks == 1
        return alone and not torch.is_grad_enabled() and x.shape[:-1].numel() <= decode.MOST_TOKENS

    def _decode(
        self, x: Tensor, bias: Tensor | None, weights: Sequence[Tensor], activation: Activation
    ) -> Tensor:
        half = len(self.linear_fc1.weights)
        first, second = _weights(weights, half, (None, None))
        bias = None if bias is None else bias.to(x.dtype)
        y = decode.feed_forward(
            x.flatten(0, -2), first.first, first.second, bias, second.first, second.second, None, activation
        )
        return y.unflatten(0, x.shape[:-1])

    def _one_operation(self) -> Activation | None:
        """The activation, if all between the bottlenecks is one operation on the rank's shard; else None.

        It is not where a guide takes part, features change ranks, or somebody put other modules, or hooks, in
        the place of the linears.
        """
        activation, linears = activation_of(self.config), (self.linear_fc1, self.linear_fc2)
        if activation is None or not all(
            isinstance(linear, StructuredLinear) and is_unhooked(linear) for linear in linears
        ):
            return None
        if not all(linear.structure.fused_kernels for linear in linears):
            return None
        if (
            any(linear.guide_weight is not None for linear in linears)
            or _splits(self)[1].needs_exchange
            or not linears[0].skip_bias_add
        ):
            return None
        return activation if fits(linears[0].weights[1], linears[1].weights[0], activation) else None


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
        of_first = NeedsGrad(needs[1], *needs[3 : 3 + half])
        of_second = NeedsGrad(any(needs[1 : 3 + half]), *needs[3 + half :])
        with ledger.inside(mlp.linear_fc1):
            pending_wide = column.exchange.spread(kept) if column.exchange.grows else Pending(kept)
        with ledger.inside(mlp.linear_fc2):
            pending = row.begin_backward(grads[0], z, second, alphas[1], of_second)
        with ledger.inside(mlp.linear_fc1):
            y, wide, whole = column.widen(x, pending_wide, first, alphas[0])
        with torch.enable_grad():
            leaves = [y.requires_grad_()] + ([] if bias is None else [bias.detach().requires_grad_()])
            features = mlp.between(y, leaves[1] if len(leaves) > 1 else None).to(y.dtype)
        with ledger.inside(mlp.linear_fc2):
            read = row.exchange_features(features.detach()).wait()
            row_gradients = row.finish_backward(pending, features.detach(), read, second, of_second)
        grad_bias, column_gradients = None, LinearGradients(None, None, None, None)
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


class _Direct(torch.autograd.Function):
    """From bottleneck to bottleneck in one operation; no guide takes part."""

    @staticmethod
    def forward(
        ctx: Any,
        mlp: StructuredMLP,
        activation: Activation,
        keep: bool,
        x: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.mlp, ctx.activation, ctx.half = mlp, activation, len(mlp.linear_fc1.weights)
        ctx.shapes = [parameter.shape for parameter in parameters]
        first, second = _weights(parameters, ctx.half, (None, None))
        column, row = _splits(mlp)
        with ledger.inside(mlp.linear_fc1):
            narrow = column.narrow(x, first.first)
            wide = column.exchange.spread(narrow).wait()
        rows = column.rows(wide)
        out, kept = shard.forward(
            _flat(wide, rows),
            first.second,
            None if bias is None else bias.to(wide.dtype),
            second.first,
            activation,
            keep=keep,
        )
        with ledger.inside(mlp.linear_fc2):
            y, z = row.complete(out.unflatten(0, rows), second.second)
        spread_again = not keep and column.exchange.grows
        ctx.save_for_backward(
            x, narrow if spread_again else wide, z, bias, *(kept or (None, None)), *parameters
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, held, z, bias, y, features, *parameters = ctx.saved_tensors
        mlp, half, needs = ctx.mlp, ctx.half, ctx.needs_input_grad[2:]
        first, second = _weights(parameters, half, (None, None))
        column, row = _splits(mlp)
        of_first = NeedsGrad(needs[1], *needs[3 : 3 + half])
        of_second = NeedsGrad(any(needs[1 : 3 + half]), *needs[3 + half :])
        kept = None if y is None else Kept(y, features)
        with ledger.inside(mlp.linear_fc1):
            pending_wide = (
                column.exchange.spread(held) if kept is None and column.exchange.grows else Pending(held)
            )
        with ledger.inside(mlp.linear_fc2):
            pending = row.begin_backward(grads[0], z, second, None, of_second)
        wide = pending_wide.wait()
        own_bias = None if bias is None else bias.to(wide.dtype)
        rows = column.rows(wide)
        tokens = rows.numel()
        # while dz travels, if all at once
        if kept is None and row.exchange.ranks > 1 and tokens <= shard.at_a_time(tokens):
            kept = shard.rebuild(_flat(wide, rows), first.second, own_bias, second.first, ctx.activation)
        grad_z, grad_second = wait_for(pending.grad_z), pending.grad_second
        pending_grads: list[Pending] = []

        def send(grad: Tensor) -> None:
            with ledger.inside(mlp.linear_fc1):
                pending_grads.append(column.exchange.collect(grad.unflatten(0, rows)))

        gradients = BottleneckGradients(None, None, None, None)
        if grad_z is not None:
            gradients = shard.backward(
                _flat(grad_z, rows),
                _flat(wide, rows),
                first.second,
                own_bias,
                second.first,
                ctx.activation,
                kept,
                BottleneckNeedsGrad(of_first.x or of_first.first, of_first.second, needs[2], of_second.first),
                send,
            )
        del pending, grad_z, kept  # not beside the gradient of x
        grad_x, grad_first = None, None
        for grad in pending_grads:
            with ledger.inside(mlp.linear_fc1):
                grad_x, grad_first = column.narrow_backward(grad, x, first.first, of_first)
        of_weights = (
            *gradients_of(
                LinearGradients(grad_x, wait_for(grad_first), gradients.second, None),
                ctx.shapes[:half],
                of_first,
                x,
            ),
            *gradients_of(
                LinearGradients(None, gradients.first, wait_for(grad_second), None),
                ctx.shapes[half:],
                of_second,
                x,
            ),
        )
        return (
            None,
            None,
            None,
            grad_x,
            None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
            *of_weights,
        )


def _flat(tensor: Tensor, rows: torch.Size) -> Tensor:
    """(rows, ..., features) -> (T, features)."""
    return tensor.flatten(0, len(rows) - 1)


def _weights(
    parameters: Sequence[Tensor], half: int, alphas: Sequence[float | None]
) -> tuple[LinearWeights, LinearWeights]:
    return weights_of(parameters[:half], alphas[0]), weights_of(parameters[half:], alphas[1])


def _splits(mlp: StructuredMLP) -> tuple[ColumnSplit, RowSplit]:
    column, row = mlp.linear_fc1.split, mlp.linear_fc2.split
    assert isinstance(column, ColumnSplit)
    assert isinstance(row, RowSplit)
    return column, row
