"""How a structured linear is computed on p tensor-parallel ranks, forward and backward: only the bottleneck z
is exchanged.

    column (h -> f)   z = V x, V replicated, on the rank's tokens; spread z; y = U z, U the rank's part
    row (f -> h)      z = V x, V the rank's part, on the rank's features; collect z; y = U z, U replicated, on
                      the rank's tokens

(V, U: first and second factor; spread, collect: collectives.Exchange.) With the guide: y = alpha W x + (1 -
alpha) U z (paper, section 4), where W is split as Megatron splits a dense linear, at its price. Both weights
of the mix are scale factors of the matrix products, which accumulate onto one another, so the mix makes no
pass over y or dy of its own. Two things are added in a pass where they had to travel: a column's dx of the
guide, and W x of a row whose second factor is block_shuffle's.

Backward is written by hand so that products run while collectives do: U's gradient while dz travels, dx while
the gradient of a replicated factor is summed. That gradient is partial wherever a rank saw only some tokens;
no factor leaves with it so, unless the sum is deferred (partial_gradients.py).

Shapes: x (rows, ..., inputs) and y (rows, ..., outputs), rows being S, or S/p with sequence parallelism; z
narrow (n, rows, ..., w) or wide (rows, ..., w), where w is (l, r), a row for each block, if block_shuffle's
second factor is to read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from sffn_kernels import mix
from torch import Tensor

from sffn_dist.parallel.collectives import Exchange, Pending, all_to_all, sum_gradient
from sffn_dist.parallel.linear_weights import LinearGradients, LinearWeights, NeedsGrad
from sffn_dist.structured.cut import Role
from sffn_dist.structured.products import (
    MatrixProduct,
    Product,
    shaped,
    shuffle,
    unshuffle,
)
from sffn_dist.structured.registry import ops
from sffn_dist.structured.structure import Structure

_DENSE = MatrixProduct()


@dataclass(frozen=True)
class SplitLinear:
    """What both linears of a feed-forward layer are given: their structure, and how the bottleneck is
    exchanged.
    """

    structure: Structure
    exchange: Exchange
    sums_gradients: bool = field(default=True, kw_only=True)  # of a factor that every rank holds

    role: ClassVar[Role]

    @cached_property
    def first_product(self) -> Product:
        return ops(self.structure).products(self.role)[0]

    @cached_property
    def second_product(self) -> Product:
        return ops(self.structure).products(self.role)[1]

    @cached_property
    def shuffled(self) -> bool:
        """Whether z is shuffled before the second factor, which reads a row of it for each block."""
        return ops(self.structure).shuffled

    @cached_property
    def guide_exchange(self) -> Exchange:
        """How x and y move for the guide: as Megatron moves them, all features at once."""
        return replace(self.exchange, chunks=(0,) * self.exchange.ranks)

    def _replicated_gradient(
        self, product: Product, grad: Tensor, x: Tensor, weight: Tensor, wanted: bool, share: float = 1.0
    ) -> Pending | None:
        """A replicated factor's gradient, ``share`` times, summed over the ranks that saw a part of it."""
        if not wanted:
            return None
        gradient = _times(product.weight_gradient(grad, x, weight), share)
        if self.exchange.tokens == "replicated" or not self.sums_gradients:  # every rank saw all; or later
            return Pending(gradient)
        return sum_gradient(gradient, self.exchange.group)


class ColumnOutput(NamedTuple):
    """What a column makes of a bottleneck: y, the wide z, x of all tokens if the guide read it."""

    y: Tensor
    z: Tensor
    whole: Tensor | None


@dataclass(frozen=True)
class ColumnSplit(SplitLinear):
    """The first linear."""

    role = "column"

    def narrow(self, x: Tensor, first: Tensor) -> Tensor:
        """V x of the rank's tokens, as a narrow z: a view, not laid out yet."""
        z, n = self.first_product.forward(x, first), self.exchange.count
        if self.shuffled:  # feature (r, l): a chunk holds some blocks l
            return (
                z.unflatten(-1, (-1, n, self.structure.needed_blocks // n)).movedim(-2, 0).transpose(-1, -2)
            )
        return _chunked(z, n)

    def rows(self, wide: Tensor) -> torch.Size:
        """The leading dimensions of a wide z."""
        return wide.shape[: -2 if self.shuffled else -1]

    def _join(self, narrow: Tensor) -> Tensor:
        """A narrow z -> (rows, ..., bottleneck), as V wrote it."""
        if self.shuffled:
            return narrow.transpose(-1, -2).movedim(0, -2).flatten(-3)
        return _joined(narrow)

    def widen(self, x: Tensor, z: Pending, weights: LinearWeights, alpha: float | None) -> ColumnOutput:
        """y, with the wide z that was on its way and, if the guide takes part, x of all tokens."""
        if alpha is None or weights.guide is None:
            wide = z.wait()
            return ColumnOutput(self.second_product.forward(wide, weights.second), wide, None)
        gathering = self.guide_exchange.spread(x.unsqueeze(0))
        wide = z.wait()
        if isinstance(self.second_product, MatrixProduct) and self.exchange.ranks == 1:  # nothing travels
            whole = gathering.wait()
            return ColumnOutput(_mixed(whole, weights.guide, wide, weights.second, alpha), wide, whole)
        y = self.second_product.forward(wide, weights.second)
        whole = gathering.wait()
        return ColumnOutput(
            _DENSE.add_forward(y, whole, weights.guide, keep=1 - alpha, scale=alpha), wide, whole
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        z: Tensor,
        weights: LinearWeights,
        alpha: float | None,
        wanted: NeedsGrad,
        whole: Tensor | None = None,
    ) -> LinearGradients:
        """Gradients of x and of the weights from that of y; ``z`` is wide.

        x of all tokens is ``whole``, or gathered for the guide.
        """
        grad_x, grad_x_guide, grad_guide, share = None, None, None, 1.0
        if alpha is not None and weights.guide is not None:
            share = 1 - alpha
            pending_x = self.guide_exchange.spread(x.unsqueeze(0)) if whole is None and wanted.guide else None
            if wanted.x and self.exchange.ranks > 1:
                grad_x_guide = self.guide_exchange.collect(_DENSE.input_gradient(grad, weights.guide))
            if wanted.guide:
                read = whole if pending_x is None else pending_x.wait()
                assert read is not None
                grad_guide = _DENSE.scaled_weight_gradient(grad, read, scale=alpha)
        pending_grad_z = None
        if wanted.x or wanted.first:
            pending_grad_z = self.exchange.collect(
                _times(self.second_product.input_gradient(grad, weights.second), share)
            )
        grad_second = (
            _times(self.second_product.weight_gradient(grad, z, weights.second), share)
            if wanted.second
            else None
        )
        grad_first = None
        if pending_grad_z is not None:
            grad_x, grad_first = self.narrow_backward(pending_grad_z, x, weights.first, wanted)
        if grad_x is not None and grad_x_guide is not None and alpha is not None:
            grad_x = grad_x.add_(grad_x_guide.wait().squeeze(0), alpha=alpha)
        elif grad_x is not None and alpha is not None and weights.guide is not None:
            grad_x = _DENSE.add_input_gradient(grad_x, grad, weights.guide, scale=alpha)
        return LinearGradients(grad_x, wait_for(grad_first), grad_second, grad_guide)

    def narrow_backward(
        self, grad_z: Pending, x: Tensor, first: Tensor, wanted: NeedsGrad
    ) -> tuple[Tensor | None, Pending | None]:
        """Gradients of x and, on its way, of the first factor, from that of the narrow z, which is on its
        way too.
        """
        joined = self._join(grad_z.wait())
        grad_first = self._replicated_gradient(self.first_product, joined, x, first, wanted.first)
        return self.first_product.input_gradient(joined, first) if wanted.x else None, grad_first


def _mixed(x: Tensor, guide: Tensor, z: Tensor, second: Tensor, alpha: float) -> Tensor:
    """alpha W x + (1 - alpha) U z, of any leading dimensions."""
    return shaped(mix.forward(x.flatten(0, -2), guide, z.flatten(0, -2), second, alpha), *x.shape[:-1], -1)


def _chunked(z: Tensor, n: int) -> Tensor:
    """(rows, ..., n w) -> (n, rows, ..., w), a view."""
    return z.unflatten(-1, (n, -1)).movedim(-2, 0)


def _joined(chunks: Tensor) -> Tensor:
    """The inverse of :func:`_chunked`."""
    return chunks.movedim(0, -2).flatten(-2)


def _times(tensor: Tensor, share: float) -> Tensor:
    """``share`` times a tensor that nobody else holds, in its place."""
    return tensor if share == 1.0 else tensor.mul_(share)


def wait_for(pending: Pending | None) -> Tensor | None:
    """What was on its way, if anything was."""
    return None if pending is None else pending.wait()


class PendingBackward(NamedTuple):
    """The first part of a row's backward: what travels while the wide features are rebuilt."""

    grad_z: Pending | None
    grad_second: Pending | None
    grad_y: Pending | None
    alpha: float | None


@dataclass(frozen=True)
class RowSplit(SplitLinear):
    """The second linear.

    ``needs_exchange`` says that the wide features are exchanged for whole blocks before the first factor
    (cut.Cut.many).
    """

    role = "row"
    needs_exchange: bool = False

    def exchange_features(self, x: Tensor) -> Pending:
        """Features (k, s', own l) of x -> (own k, s', l)."""
        if not self.needs_exchange:
            return Pending(x)
        p, blocks = self.exchange.ranks, self.structure.needed_blocks
        # by groups of k: (p, rows, ..., k s', own l)
        parts = x.unflatten(-1, (p, -1, blocks // p)).movedim(-3, 0)
        return all_to_all(parts, self.exchange.group).then(
            lambda received: received.movedim(0, -2).flatten(-3)
        )

    def _exchange_features_back(self, x: Tensor) -> Pending:
        """The inverse of :meth:`exchange_features`."""
        if not self.needs_exchange:
            return Pending(x)
        p, blocks = self.exchange.ranks, self.structure.needed_blocks
        parts = x.unflatten(-1, (-1, p, blocks // p)).movedim(-2, 0)
        return all_to_all(parts, self.exchange.group).then(
            lambda received: received.movedim(0, -3).flatten(-3)
        )

    def forward(
        self, x: Tensor, weights: LinearWeights, alpha: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y, x as the first factor reads it, and z of the rank's tokens as the second one does."""
        read = self.exchange_features(x).wait()
        pending_z = self.exchange.collect(self.first_product.forward(read, weights.first))
        guided = None
        if alpha is not None and weights.guide is not None and self.exchange.ranks > 1:
            guided = self.guide_exchange.collect(_DENSE.forward(x, weights.guide))
        z = self._read(pending_z)
        if alpha is None or weights.guide is None:
            return self.second_product.forward(z, weights.second), read, z
        return self._mix(x, z, weights.second, weights.guide, alpha, guided), read, z

    def _read(self, z: Pending) -> Tensor:
        """A narrow z that is on its way, as the second factor reads it."""
        joined = _joined(z.wait())
        return shuffle(joined, self.structure.needed_blocks).contiguous() if self.shuffled else joined

    def complete(self, wide: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and z of the rank's tokens, from the wide z that the rank's features make.

        :meth:`forward` after the first factor.
        """
        z = self._read(self.exchange.collect(wide))
        return self.second_product.forward(z, second), z

    def _mix(
        self, x: Tensor, z: Tensor, second: Tensor, guide: Tensor, alpha: float, guided: Pending | None
    ) -> Tensor:
        """alpha W x + (1 - alpha) U z; ``guided`` is W x where it had to travel."""
        if guided is None and isinstance(self.second_product, MatrixProduct):
            return _mixed(x, guide, z, second, alpha)
        if guided is None:
            return _DENSE.add_forward(
                self.second_product.forward(z, second), x, guide, keep=1 - alpha, scale=alpha
            )
        if isinstance(self.second_product, MatrixProduct):
            return self.second_product.add_forward(
                guided.wait().squeeze(0), z, second, keep=alpha, scale=1 - alpha
            )
        return self.second_product.forward(z, second).lerp_(guided.wait().squeeze(0), alpha)

    def begin_backward(
        self, grad: Tensor, z: Tensor, weights: LinearWeights, alpha: float | None, wanted: NeedsGrad
    ) -> PendingBackward:
        """What needs only dy and z: dz goes out, the replicated second factor's gradient is computed and
        goes out to be summed.
        """
        grad_y, share = None, 1.0
        if alpha is not None and weights.guide is not None:
            grad_y = self.guide_exchange.spread(grad.unsqueeze(0)) if wanted.x or wanted.guide else None
            share = 1 - alpha
        pending_grad_z = None
        if wanted.x or wanted.first:
            grad_z = _times(self.second_product.input_gradient(grad, weights.second), share)
            if self.shuffled:
                grad_z = unshuffle(grad_z)
            pending_grad_z = self.exchange.spread(_chunked(grad_z, self.exchange.count))
        return PendingBackward(
            pending_grad_z,
            self._replicated_gradient(self.second_product, grad, z, weights.second, wanted.second, share),
            grad_y,
            alpha,
        )

    def finish_backward(
        self, pending: PendingBackward, x: Tensor, read: Tensor, weights: LinearWeights, wanted: NeedsGrad
    ) -> LinearGradients:
        """Gradients of x and of the weights; ``x`` and ``read`` as in forward."""
        grad_x, grad_first, grad_guide = None, None, None
        if pending.grad_z is not None:
            grad_z = pending.grad_z.wait()
            pending_grad_x = (
                self._exchange_features_back(self.first_product.input_gradient(grad_z, weights.first))
                if wanted.x
                else None
            )
            grad_first = (
                self.first_product.weight_gradient(grad_z, read, weights.first) if wanted.first else None
            )
            grad_x = wait_for(pending_grad_x)
        if pending.grad_y is not None and weights.guide is not None and pending.alpha is not None:
            grad_y = pending.grad_y.wait()
            if grad_x is not None:
                grad_x = _DENSE.add_input_gradient(grad_x, grad_y, weights.guide, scale=pending.alpha)
            grad_guide = (
                _DENSE.scaled_weight_gradient(grad_y, x, scale=pending.alpha) if wanted.guide else None
            )
        return LinearGradients(grad_x, grad_first, wait_for(pending.grad_second), grad_guide)
