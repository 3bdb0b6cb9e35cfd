"""Block-diagonal products by Triton: one kernel, three passes, any strides.

    out[k] = A[k] B[k]  A (K, M, S)            B (K, S, N)                out (K, M, N)

    product             A = x as (K, T, I)     B = weight as (K, I, O)    out = y as (K, T, O)
    input gradient      A = dy as (K, T, O)    B = weight (K, O, I)       out = dx as (K, T, I)
    weight gradient     A = dy as (K, O, T)    B = x as (K, T, I)         out = dw (K, O, I)

All three are views: a shuffle is in their strides, and nothing is copied.

The weight gradient has few tiles and a long sum over tokens: that is split over programs, whose partial sums
are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sffn_kernels.launching import Tile, capability, launch
from sffn_kernels.tiles_triton import accumulate, in_groups, precision, strides

CONFIGS = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
# On compute capability 10.0 (B200) the second spills registers, by 4 warps and by 8.
CONFIGS_10 = (CONFIGS[0], *CONFIGS[2:])
# Programs of a weight gradient that keep a GPU busy, and tokens that are worth a program.
_PROGRAMS, _TOKENS = 256, 512


def configs(device: torch.device) -> tuple[Tile, ...]:
    """The tilings for a device."""
    return CONFIGS_10 if capability(device) == 10 else CONFIGS


@triton.jit
def _batched(
    a, b, out,
    M, N, size, per_split,
    a_k, a_m, a_s,
    b_k, b_s, b_n,
    out_split, out_k, out_m, out_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = in_groups(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    block, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    at_m, at_n, start = (row * BM).to(tl.int64), (column * BN).to(tl.int64), split * per_split
    rows, columns = m < M - row * BM, n < N - column * BN
    acc = tl.zeros((BM, BN), tl.float32)
    left = a + block * a_k + start * a_s + at_m * a_m + m * a_m
    right = b + block * b_k + start * b_s + at_n * b_n + n * b_n
    acc = accumulate(
        acc,
        left,
        right,
        rows,
        columns,
        tl.minimum(size - start, per_split).to(tl.int32),
        a_s,
        b_s,
        BK,
        PRECISION,
    )
    out += split * out_split + block * out_k + at_m * out_m + at_n * out_n
    tl.store(out + m * out_m + n * out_n, acc.to(out.dtype.element_ty), mask=rows & columns)


def batched(a: Tensor, b: Tensor, out: Tensor, tile: Tile) -> None:
    """out (K, M, N) = a (K, M, S) b (K, S, N), or with out (splits, K, M, N) partial sums over equal parts
    of S.
    """
    parts = out if out.dim() == 4 else out.unsqueeze(0)
    blocks, m, size = a.shape
    n = b.shape[2]
    if not size:
        out.zero_()
        return
    per_split = -(-size // parts.shape[0])
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), blocks, parts.shape[0])
    shapes = (m, n, size, per_split, *strides(a), *strides(b), *strides(parts))
    constants = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "PRECISION": precision(a.dtype)}
    launch(_batched, grid, a, b, parts, *shapes, warps=tile.warps, stages=tile.stages, **constants)


def product(x: Tensor, weight: Tensor, tile: Tile, out: Tensor | None = None) -> Tensor:
    """x (T, K, I), weight (K, O, I) -> (T, K, O), written to ``out`` if that is given, in any strides."""
    out = x.new_empty(x.shape[0], *weight.shape[:2]) if out is None else out
    batched(x.transpose(0, 1), weight.transpose(1, 2), out.transpose(0, 1), tile)
    return out


def input_gradient(grad: Tensor, weight: Tensor, tile: Tile, out: Tensor | None = None) -> Tensor:
    """Dy (T, K, O), weight (K, O, I) -> dx (T, K, I)."""
    return product(grad, weight.transpose(1, 2), tile, out)


def weight_gradient(grad: Tensor, x: Tensor, tile: Tile) -> Tensor:
    """Dy (T, K, O), x (T, K, I) -> dw (K, O, I); partial sums over tokens in fp32."""
    tokens, blocks, outputs = grad.shape
    inputs = x.shape[2]
    tiles = blocks * triton.cdiv(outputs, tile.m) * triton.cdiv(inputs, tile.n)
    splits = max(1, min(_PROGRAMS // max(tiles, 1), tokens // _TOKENS))
    out = torch.empty(
        splits, blocks, outputs, inputs, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device
    )
    batched(grad.permute(1, 2, 0), x.transpose(0, 1), out, tile)
    return out.sum(0).to(x.dtype) if splits > 1 else out[0]


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch) of every tiling, in bf16 on tensors without memory: what an ahead-of-time check
    compiles.
    """
    x, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((30_000, 4, 512), (4, 2048, 512))
    )
    grad = torch.empty(30_000, 4, 2048, dtype=torch.bfloat16, device="meta")
    shuffled = torch.empty(30_000, 2048, 4, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    for tile in configs(x.device):
        yield f"product {tile.name}", partial(product, x, weight, tile)
        yield f"product, shuffled {tile.name}", partial(product, x, weight, tile, shuffled)
        yield f"input gradient {tile.name}", partial(input_gradient, grad, weight, tile)
        yield f"weight gradient {tile.name}", partial(weight_gradient, grad, x, tile)
