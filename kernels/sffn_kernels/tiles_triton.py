"""What the kernels share: a product of two tiles accumulated over the summed dimension, activations, the
order of programs.

Everything is summed and activated in fp32; fp32 inputs are multiplied in fp32 ("ieee"), not TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: on tensor cores, but for fp32 as fp32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def strides(tensor: Tensor) -> list[int]:
    """A tensor's strides, 0 in dimensions of size 1: theirs say nothing, and an odd one would keep Triton
    from loading 16 bytes at once.
    """
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


@triton.jit
def in_groups(program, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program's tile: GROUP rows of tiles go through all columns together, so that what
    they read stays in L2.
    """
    size = GROUP * columns
    first = program // size * GROUP
    here = tl.minimum(rows - first, GROUP)
    return first + program % size % here, program % size // here


@triton.jit
def accumulate(
    acc,
    a,  # (M, 1) pointers of the rows of the left operand
    b,  # (1, N) pointers of the columns of the right one
    rows,  # (M, 1), (1, N): which of them exist
    columns,
    size,  # of the summed dimension
    a_stride,
    b_stride,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Acc + A B."""
    k = tl.arange(0, BLOCK)
    a += k[None, :] * a_stride
    b += k[:, None] * b_stride
    for start in range(0, size, BLOCK):
        there = k < size - start
        left = tl.load(a, mask=rows & there[None, :], other=0.0)
        right = tl.load(b, mask=columns & there[:, None], other=0.0)
        a += BLOCK * a_stride
        b += BLOCK * b_stride
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def value(y, ACTIVATION: tl.constexpr):
    """activation(y): GELU, or SwiGLU's silu."""
    if ACTIVATION == "gelu":
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACTIVATION == "gelu_erf":
        return y * 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
    return y * tl.sigmoid(y)


@triton.jit
def slope(y, ACTIVATION: tl.constexpr):
    """The derivative of :func:`value`."""
    if ACTIVATION == "gelu":
        s = tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        return s + y * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * y * y)
    if ACTIVATION == "gelu_erf":
        return 0.5 * (1.0 + tl.erf(y * 0.7071067811865476)) + y * 0.3989422804014327 * tl.exp(-0.5 * y * y)
    s = tl.sigmoid(y)
    return s * (1.0 + y * (1.0 - s))
