"""A structured feed-forward layer for the few tokens of a decoding step, 1 to 64.

Inference only: there is no backward.

What such a step costs is reading the weights once, and starting what reads them. A layer is three launches:

    z   = W1 x                      :func:`product`     first linear, first factor
    out = V activation(U z + b1)    :func:`bottleneck`  first linear, second factor;
                                                        second linear, first factor
    y   = W2 out + b2               :func:`product`     second linear, second factor

The kernels split the summed features among so many programs that all of a device's multiprocessors read; see
``decode_triton``. Without Triton, and where plain torch was measured to be faster, the same is plain torch
(``dispatch``).

Each operation is registered with torch as ``sffn::decode_...``, for ``torch.compile``; without it, it is
called directly, which is sooner done.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sffn_kernels import activation as act
from sffn_kernels import block_diagonal, dispatch
from sffn_kernels import bottleneck_plain as wide

MOST_TOKENS = 64


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    """y[t, k, o] = sum_i weight[k, o, i] x[t, k, i] + bias; a dense matrix is one block.

    Args:
        x: (T, K*I), features grouped by block, or (T, K, I), of any strides.
        weight: (K, O, I), or dense (O, I).
        bias: (K*O,), in the order of the outputs.
        interleaved: y of block k, row o is feature o*K + k, in place of k*O + o: Monarch's second
            factor with its output shuffle.

    Returns:
        (T, K*O), contiguous.

    Raises:
        ValueError: more than 64 tokens, sizes that do not fit, more than one dtype.
        RuntimeError: an argument whose gradient is asked for.
    """
    _check_inference(x, weight, bias)
    blocks = weight if weight.dim() == 3 else weight.unsqueeze(0)
    k, outputs, inputs = blocks.shape
    if x.dim() not in (2, 3) or x.shape[1:].numel() != k * inputs or (x.dim() == 3 and x.shape[1] != k):
        raise ValueError(
            f"x {tuple(x.shape)}: must be (T, {k * inputs}) or (T, {k}, {inputs}) for a weight "
            f"{tuple(weight.shape)}"
        )
    _check_bias(bias, k * outputs)
    run = _product if torch.compiler.is_compiling() else _run_product
    return run(x if x.dim() == 3 else x.unflatten(1, (k, inputs)), blocks, bias, interleaved)


def bottleneck(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str) -> Tensor:
    """out = V activation(U z + b): from the first linear's bottleneck to the second linear's.

    Shapes, for all three structures, are those of ``bottleneck.forward``: z (T, R) with U (F, R), or z (T, L,
    R) with U (L, F/L, R); b (F,); V (O, f) or (K, O/K, f/K). z, and the weights too, may have any strides.

    Returns:
        (T, O), contiguous.

    Raises:
        ValueError: more than 64 tokens, sizes that do not fit (K must divide f/L: ``bottleneck_plain.fits``),
            more than one dtype, an unknown activation.
        RuntimeError: an argument whose gradient is asked for.
    """
    checked = act.checked(activation)
    _check_inference(z, second, bias, first)
    if z.dim() != second.dim() or z.shape[1:] != (*second.shape[:-2], second.shape[-1]):
        raise ValueError(f"z {tuple(z.shape)}: does not fit a second factor {tuple(second.shape)}")
    features = second.shape[:-1].numel()
    k, inputs = (first.shape[0] if first.dim() == 3 else 1), first.shape[-1]
    if features != k * inputs * act.halves(checked) or not wide.fits(second, first, checked):
        raise ValueError(
            f"{activation} of features by {tuple(second.shape)}: do not fit a first factor "
            f"{tuple(first.shape)}"
        )
    _check_bias(bias, features)
    return (_bottleneck if torch.compiler.is_compiling() else _run_bottleneck)(
        z, second, bias, first, checked
    )


def feed_forward(
    x: Tensor,
    first1: Tensor,
    second1: Tensor,
    bias1: Tensor | None,
    first2: Tensor,
    second2: Tensor,
    bias2: Tensor | None,
    activation: str,
) -> Tensor:
    """A structured layer that one rank holds whole: y = W2 activation(W1 x + b1) + b2, W1 and W2 of two
    factors each.

    Shapes: x (T, N); first factors (R, N), or (B, R/B, N/B) with blocks; second factors (M, R), or (B, M/B,
    R/B) for block_shuffle; M = F of the first linear, twice as wide as the second one's N for a gated
    activation. Biases (M,), or None.

    Returns:
        (T, M) of the second linear, contiguous.

    Raises:
        ValueError, RuntimeError: as :func:`product` and :func:`bottleneck`.
    """
    z = product(x, first1)
    if wide.fits(second1, first2, act.checked(activation)):
        out = bottleneck(_dealt(z, second1), second1, bias1, first2, activation)
    else:  # blocks that cut each other: the wide features are brought into their own order
        y = product(_dealt(z, second1), second1, bias1, interleaved=second1.dim() == 3)
        out = product(act.forward(y, act.checked(activation)), first2)
    return product(_dealt(out, second2), second2, bias2, interleaved=second2.dim() == 3)


def _dealt(z: Tensor, second: Tensor) -> Tensor:
    """Bottleneck (T, R) -> what the second factor reads, a view: for block_shuffle (T, L, R/L), feature
    r*L + l at place (l, r).
    """
    return z.unflatten(1, (-1, second.shape[0])).transpose(1, 2) if second.dim() == 3 else z


def _check_inference(x: Tensor, *others: Tensor | None) -> None:
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "decoding has no backward: call it under torch.no_grad() or torch.inference_mode()"
        )
    if x.shape[0] > MOST_TOKENS:
        raise ValueError(
            f"{x.shape[0]} tokens: decoding takes at most {MOST_TOKENS}; for more, use the layer itself"
        )
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"dtypes {', '.join(str(tensor.dtype) for tensor in tensors)}: must be one")


def _check_bias(bias: Tensor | None, features: int) -> None:
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias {tuple(bias.shape)}: must be ({features},)")


# ------------------------------------------------------------------------------------------------- operations


# their counters outlive a call: a graph that torch.compile captures would have them in its own memory
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def _run_product(x: Tensor, weight: Tensor, bias: Tensor | None, interleaved: bool) -> Tensor:
    def kernels() -> dispatch.Ways[Tensor]:
        from sffn_kernels import decode_triton

        return decode_triton.products(x, weight, bias, interleaved=interleaved)

    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[:2].numel())
    sizes = (x.shape[0], *weight.shape)
    return dispatch.run(
        "decode_product", sizes, x, lambda: _plain_product(x, weight, bias, interleaved=interleaved), kernels
    )


_product = torch.library.custom_op("sffn::decode_product", _run_product, mutates_args=(), tags=_TAGS)


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * weight.shape[1])


def _plain_product(x: Tensor, weight: Tensor, bias: Tensor | None, *, interleaved: bool) -> Tensor:
    if weight.shape[0] == 1:
        return F.linear(x.squeeze(1), weight.squeeze(0), bias)
    y = (block_diagonal.interleaved_product if interleaved else block_diagonal.product)(x, weight).flatten(1)
    return y if bias is None else y.add_(bias)


def _run_bottleneck(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str) -> Tensor:
    checked = act.checked(activation)

    def kernels() -> dispatch.Ways[Tensor]:
        from sffn_kernels import decode_triton

        return decode_triton.bottlenecks(z, second, bias, first, checked)

    if z.shape[0] == 0:
        return z.new_empty(0, first.shape[:-1].numel())
    blocks = [matrix.shape[0] if matrix.dim() == 3 else 1 for matrix in (second, first)]
    sizes = (z.shape[0], second.shape[:-1].numel(), second.shape[-1], first.shape[:-1].numel(), *blocks)
    plain = lambda: _plain_bottleneck(z, second, bias, first, checked)  # noqa: E731
    return dispatch.run(f"decode_bottleneck_{activation}", sizes, z, plain, kernels)


def _plain_bottleneck(
    z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: act.Activation
) -> Tensor:
    """With the features in their own order: those of few tokens are sooner copied than V, whose columns
    bottleneck.py orders.
    """
    y = wide.widen(z, second, None).transpose(1, 2).flatten(1)
    features = act.forward(y if bias is None else y + bias, activation)
    if first.dim() == 2:
        return F.linear(features, first)
    return block_diagonal.product(features.unflatten(1, (first.shape[0], -1)), first).flatten(1)


_bottleneck = torch.library.custom_op("sffn::decode_bottleneck", _run_bottleneck, mutates_args=(), tags=_TAGS)


@_bottleneck.register_fake
def _(z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: str) -> Tensor:
    return z.new_empty(z.shape[0], first.shape[:-1].numel())
