"""Block-diagonal products, plain and with Monarch's shuffle folded in.

Shapes: T tokens (any leading dimensions), K blocks, I inputs and O outputs of a block.

:func:`product`, :func:`input_gradient` and :func:`weight_gradient` are the operation without autograd, for
callers that write their own backward; any strides will do. With autograd the weight *itself* is saved, never
a view of it: a saved view would keep ZeRO-3's gathered copy of the parameter alive until backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sffn_kernels import dispatch


def product(x: Tensor, weight: Tensor) -> Tensor:
    """y[t, k, o] = sum_i weight[k, o, i] x[t, k, i]: x (..., K, I) and weight (K, O, I) -> (..., K, O),
    contiguous.
    """
    return _by_block(x, weight.transpose(1, 2))


def interleaved_product(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`product` with the blocks interleaved: y[t, o, k] -> (..., O, K).

    By Triton it is stored so; BLAS cannot, and it is copied.
    """
    return _by_block(x, weight.transpose(1, 2), interleave=True)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """dx[t, k, i] = sum_o weight[k, o, i] dy[t, k, o]: dy (..., K, O) -> (..., K, I), contiguous."""
    return _by_block(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """dw[k, o, i] = sum_t dy[t, k, o] x[t, k, i] over all tokens -> (K, O, I)."""
    grad, x = grad.flatten(0, -3), x.flatten(0, -3)

    def kernels() -> dispatch.Ways[Tensor]:
        from sffn_kernels import block_diagonal_triton as ours

        return {tile.name: partial(ours.weight_gradient, grad, x, tile) for tile in ours.configs(x.device)}

    def by_torch() -> Tensor:
        return torch.bmm(grad.permute(1, 2, 0), x.transpose(0, 1))

    return dispatch.run("block_diagonal_weight_gradient", (*grad.shape, x.shape[2]), x, by_torch, kernels)


def _by_block(x: Tensor, matrices: Tensor, *, interleave: bool = False) -> Tensor:
    """x (..., K, I) times matrices (K, I, O), written straight into (..., K, O); or (..., O, K)."""
    flat = x.flatten(0, -3)
    tokens, blocks, outputs = *flat.shape[:2], matrices.shape[2]

    def by_torch() -> Tensor:
        out = x.new_empty(tokens, blocks, outputs)
        torch.bmm(flat.transpose(0, 1), matrices, out=out.transpose(0, 1))
        return out.transpose(1, 2).contiguous() if interleave else out

    def kernels() -> dispatch.Ways[Tensor]:
        from sffn_kernels import block_diagonal_triton as ours

        def way(tile: Any) -> Tensor:
            out = x.new_empty((tokens, outputs, blocks) if interleave else (tokens, blocks, outputs))
            ours.product(flat, matrices.transpose(1, 2), tile, out.transpose(1, 2) if interleave else out)
            return out

        return {tile.name: partial(way, tile) for tile in ours.configs(x.device)}

    shuffled = " from shuffled" * (x.stride(-1) != 1) + " to shuffled" * interleave
    out = dispatch.run(f"block_diagonal{shuffled}", (*flat.shape, outputs), x, by_torch, kernels)
    return out.view(*x.shape[:-2], *out.shape[1:])


def block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """y[t, k, o] = sum_i weight[k, o, i] x[t, k, i].

    Args:
        x: (..., K*I), features grouped by block.
        weight: (K, O, I).

    Returns:
        (..., K*O), features grouped by block.
    """
    blocks, outputs, inputs = weight.shape
    y = _op(x.reshape(-1, blocks, inputs), weight)
    return y.reshape(*x.shape[:-1], blocks * outputs)


def shuffled_block_diagonal(z: Tensor, weight: Tensor) -> Tensor:
    """Monarch's second factor with both shuffles: y[t, s, l] = sum_r weight[l, s, r] z[t, r, l].

    Args:
        z: (..., R*K), features of the bottleneck; feature r*K + l feeds block l.
        weight: (K, O, R).

    Returns:
        (..., O*K), feature s*K + l from row s of block l.
    """
    blocks, outputs, reduced = weight.shape
    y = _op(z.reshape(-1, reduced, blocks).transpose(1, 2), weight)  # (T, K, O)
    return y.transpose(1, 2).reshape(*z.shape[:-1], outputs * blocks)


# ------------------------------------------------------------------------------- the operation, with autograd


@torch.library.custom_op("sffn::block_diagonal", mutates_args=())
def _op(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K, I), weight (K, O, I) -> (T, K, O)."""
    return product(x, weight)


@torch.library.custom_op("sffn::block_diagonal_input_gradient", mutates_args=())
def _input_gradient_op(grad: Tensor, weight: Tensor) -> Tensor:
    return input_gradient(grad, weight)


@torch.library.custom_op("sffn::block_diagonal_weight_gradient", mutates_args=())
def _weight_gradient_op(grad: Tensor, x: Tensor) -> Tensor:
    return weight_gradient(grad, x)


@_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *weight.shape[:2])


@_input_gradient_op.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:2], weight.shape[2])


@_weight_gradient_op.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[1:], x.shape[2])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x = _input_gradient_op(grad, weight) if ctx.needs_input_grad[0] else None
    return grad_x, _weight_gradient_op(grad, x) if ctx.needs_input_grad[1] else None


_op.register_autograd(_differentiate, setup_context=_keep)
