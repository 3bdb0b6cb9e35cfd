"""How a collective is done: explicit group, out of place, started now and waited for later.

The layers say where.

A bottleneck z of n equal chunks of features moves between two states:

    narrow   all chunks, of the rank's own tokens: (n, rows/p, ..., w)
    wide     the rank's own chunk, of all tokens: (rows, ..., w)

:meth:`Exchange.spread` takes narrow to wide, :meth:`Exchange.collect` wide to narrow, summing what ranks with
the same chunk hold. Each is the other's adjoint, so the forward of one is the backward of the other:

    tokens      (sequence parallelism)   spread                      collect
      n = 1                              all-gather                  reduce-scatter
      n > 1                              all-to-all                  all-to-all, sum
    replicated  (every rank has all tokens)
      n = 1                              identity                    all-reduce
      n = p                              take own chunk              all-gather of features
      else                               take own chunk              all-to-all of parts, sum, all-gather
    caller      (somebody else sums: Megatron's token dispatcher of experts)
      any n                              take own chunk              zero-padded
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sffn_dist.parallel import ledger

PARTIAL_SUMS = "_partial_sums"  # where a model keeps the hooks of sum_partial_gradients
Tokens = Literal["tokens", "replicated", "caller"]


class Pending:
    """A result that may still be on its way; ``inputs`` stay alive until it is there."""

    def __init__(self, out: Tensor, work: dist.Work | None = None, *inputs: Tensor):
        self._out, self._work, self._inputs = out, work, inputs
        self._finish: Callable[[Tensor], Tensor] | None = None

    def then(self, finish: Callable[[Tensor], Tensor]) -> Pending:
        """Itself, its result passed through ``finish``."""
        assert self._finish is None
        self._finish = finish
        return self

    def wait(self) -> Tensor:
        """The result; later work of this device sees it."""
        if self._work is not None:
            self._work.wait()
        self._work, self._inputs = None, ()
        if self._finish is not None:
            self._out, self._finish = self._finish(self._out), None
        return self._out


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum over the group; ``x`` is used up."""
    if group.size() == 1:
        return Pending(x)
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, group=group, async_op=True))


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """(...) of each rank -> (p, ...)."""
    x = x.contiguous()
    out = x.new_empty(group.size(), *x.shape)
    return Pending(out, dist.all_gather_into_tensor(out.view(-1), x.view(-1), group=group, async_op=True), x)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """(p, ...) of each rank -> the sum of the ranks' own entries (...)."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1:])
    return Pending(out, dist.reduce_scatter_tensor(out.view(-1), x.view(-1), group=group, async_op=True), x)


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """(p, ...), entry j for rank j -> (p, ...), entry i from rank i."""
    if group.size() == 1:
        return Pending(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    return Pending(out, dist.all_to_all_single(out.view(-1), x.view(-1), group=group, async_op=True), x)


@dataclass(frozen=True)
class Exchange:
    """The two ways between a narrow and a wide bottleneck in ``group``.

    Rank j computes with the features of chunk ``chunks[j]``.
    """

    group: dist.ProcessGroup
    tokens: Tokens
    chunks: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return len(self.chunks)

    @cached_property
    def count(self) -> int:
        """Chunks n."""
        return max(self.chunks) + 1

    @cached_property
    def own(self) -> int:
        return self.chunks[self.group.rank()]

    @cached_property
    def _by_chunk(self) -> tuple[int, ...]:
        """Ranks in order of their chunk."""
        return tuple(sorted(range(self.ranks), key=lambda rank: self.chunks[rank]))

    @property
    def grows(self) -> bool:
        """Whether a rank's wide z is larger than its narrow z."""
        return self.tokens == "tokens" and self.count < self.ranks

    def spread(self, z: Tensor) -> Pending:
        """Narrow (n, rows/p, ..., w) -> wide (rows, ..., w)."""
        if self.tokens != "tokens" or self.ranks == 1:
            return Pending(z[self.own].contiguous())
        if self.count == 1:
            return all_gather(z[0], self.group).then(_flat)
        return all_to_all(_in_order(z, self.chunks), self.group).then(_flat)

    def collect(self, z: Tensor) -> Pending:
        """Wide (rows, ..., w) -> narrow (n, rows/p, ..., w), summed; ``z`` is used up.

        Raises ValueError if p does not divide the rows.
        """
        if self.ranks == 1:
            return Pending(z.unsqueeze(0))
        if self.tokens == "tokens":
            if z.shape[0] % self.ranks:
                raise ValueError(
                    f"{z.shape[0]} rows of the sequence cannot be split over {self.ranks} "
                    f"tensor-parallel ranks"
                )
            by_rank = z.unflatten(0, (self.ranks, -1))
            if self.count == 1:
                return reduce_scatter(by_rank, self.group).then(lambda out: out.unsqueeze(0))
            return all_to_all(by_rank, self.group).then(self._sum_chunks)
        if self.tokens == "replicated" and self.count == self.ranks:
            return all_gather(z, self.group).then(self._sum_chunks)
        if self.tokens == "replicated" and self.count > 1 and z.numel() % self.ranks == 0:
            # each rank sums one p-th part of every chunk: r/n, then r; a zero-padded all-reduce would be 2r
            # (n, numel/p)
            summed = all_to_all(z.reshape(self.ranks, -1), self.group).then(self._sum_chunks).wait()
            return all_gather(summed, self.group).then(
                lambda parts: parts.movedim(0, 1).reshape(self.count, *z.shape)
            )
        padded = z.unsqueeze(0)
        if self.count > 1:
            padded = z.new_zeros(self.count, *z.shape)
            padded[self.own] = z
        return all_reduce(padded, self.group) if self.tokens == "replicated" else Pending(padded)

    def _sum_chunks(self, parts: Tensor) -> Tensor:
        """(p, ...) by rank -> (n, ...), the parts of each chunk summed in the order of ranks: always the
        same bits.
        """
        parts = _in_order(parts, self._by_chunk)
        return parts if self.count == self.ranks else parts.unflatten(0, (self.count, -1)).sum(1)


def _in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Entries of dimension 0 in this order; no list of indices goes to the device."""
    return x if order == tuple(range(x.shape[0])) else torch.stack([x[i] for i in order])


def _flat(parts: Tensor) -> Tensor:
    return parts.flatten(0, 1)


def sum_gradient(gradient: Tensor, group: dist.ProcessGroup) -> Pending:
    """The gradient of a parameter that every rank holds and each has a part of; ``gradient`` is used up."""
    with ledger.purpose("gradient"):
        return all_reduce(gradient, group)


def sum_partial_gradients(module: nn.Module, group: dist.ProcessGroup) -> list[str]:
    """Sum the gradient of every parameter marked ``sequence_parallel`` over the tensor-parallel group.

    Returns their names.

    Such a parameter is held by every rank but sees only the rank's own tokens: norms, biases of row-parallel
    linears. (Replicated factors are not marked: their linear sums them itself.) A hook on the leaf does the
    sum, once a backward pass, unless partial_gradients.defer takes it away again.
    """
    if group.size() == 1:
        return []
    names, hooks = [], []
    for name, parameter in module.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            hook = parameter.register_hook(lambda gradient: sum_gradient(gradient.clone(), group).wait())
            names.append(name)
            hooks.append((parameter, hook))
    module.__dict__[PARTIAL_SUMS] = hooks  # no attribute of a module: nothing of it is saved or moved
    return names
