"""How a collective is done: explicit group, out of place, identity in a group of one. The layers say where.

    function           forward               backward
    copy               identity              all-reduce
    reduce             all-reduce            identity
    gather_tokens      all-gather, dim 0     reduce-scatter, dim 0
    scatter_tokens     reduce-scatter, dim 0 all-gather, dim 0

Tensors are (S, batch, features); with sequence parallelism a rank holds S/p consecutive rows of dimension 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group)
    return out


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if x.shape[0] % group.size():
        raise ValueError(f"{x.shape[0]} rows of the sequence cannot be split over {group.size()} tensor-parallel ranks")
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.group), None


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, whose gradient is summed over the group: for what every rank holds and uses in part."""
    return x if group.size() == 1 else _Copy.apply(x, group)


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results, on every rank."""
    return x if group.size() == 1 else _Reduce.apply(x, group)


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(S/p, ...) of each rank -> (S, ...)."""
    return x if group.size() == 1 else _GatherTokens.apply(x, group)


def scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the ranks' partial (S, ...) -> own (S/p, ...)."""
    return x if group.size() == 1 else _ScatterTokens.apply(x, group)


def sum_partial_gradients(module: nn.Module, group: dist.ProcessGroup) -> list[str]:
    """Sum the gradient of every parameter marked ``sequence_parallel`` over the tensor-parallel group; returns their names.

    Such a parameter is held by every rank but sees only the rank's own tokens: norms, biases of row-parallel linears, replicated
    factors. A hook on the leaf does the sum before any ZeRO stage sees the gradient, once a backward pass.
    """
    if group.size() == 1:
        return []
    names = []
    for name, parameter in module.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(lambda gradient: _all_reduce(gradient, group))
            names.append(name)
    return names
