"""The guided mix by Triton: two products in one accumulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sffn_kernels.launching import Tile, launch
from sffn_kernels.tiles_triton import accumulate, in_groups, precision, strides

CONFIGS = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4))


@triton.jit
def _mixed(
    a, b, c, d, bias, out,
    between, after,
    T, M, N, R,
    a_t, a_n, b_m, b_n, c_t, c_r, d_m, d_r, out_t,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = in_groups(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(M, BN), 8)
    t, m = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    begin, start = (row * BM).to(tl.int64), (column * BN).to(tl.int64)
    rows, columns = t < T - row * BM, m < M - column * BN
    acc = tl.zeros((BM, BN), tl.float32)
    left, right = a + begin * a_t + t * a_t, b + start * b_m + m * b_m
    acc = accumulate(acc, left, right, rows, columns, N, a_n, b_n, BK, PRECISION) * between
    left, right = c + begin * c_t + t * c_t, d + start * d_m + m * d_m
    acc = accumulate(acc, left, right, rows, columns, R, c_r, d_r, BK, PRECISION) * after
    if HAS_BIAS:
        acc += tl.load(bias + start + m, mask=columns, other=0.0).to(tl.float32)
    tl.store(out + begin * out_t + start + (t * out_t + m), acc.to(out.dtype.element_ty), mask=rows & columns)


def mixed(
    x: Tensor, guide: Tensor, z: Tensor, second: Tensor, alpha: float, bias: Tensor | None, tile: Tile
) -> Tensor:
    """alpha W x + (1 - alpha) U z + b, (T, M), from x (T, N), W (M, N), z (T, R), U (M, R).

    The product of the smaller weight goes first and is scaled by the ratio of the two, at most 1, before the
    other is added to it.
    """
    pairs = [(alpha, x, guide), (1 - alpha, z, second)]
    (less, a, b), (more, c, d) = sorted(pairs, key=lambda pair: pair[0])
    tokens, outputs = x.shape[0], guide.shape[0]
    out = x.new_empty(tokens, outputs)
    own_bias = x.new_empty(0) if bias is None else bias.contiguous()
    grid = (triton.cdiv(tokens, tile.m) * triton.cdiv(outputs, tile.n),)
    sizes = (tokens, outputs, a.shape[1], c.shape[1])
    given = [stride for tensor in (a, b, c, d) for stride in strides(tensor)]
    constants = {
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "HAS_BIAS": bias is not None,
        "PRECISION": precision(x.dtype),
    }
    scales = (less / more, more)
    launch(
        _mixed,
        grid,
        a,
        b,
        c,
        d,
        own_bias,
        out,
        *scales,
        *sizes,
        *given,
        outputs,
        warps=tile.warps,
        stages=tile.stages,
        **constants,
    )
    return out


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch) of every tiling, in bf16 on tensors without memory: what an ahead-of-time check
    compiles.
    """
    shapes = ((30_000, 2048), (8192, 2048), (30_000, 512), (8192, 512))
    x, guide, z, second = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    for tile in CONFIGS:
        yield f"mix {tile.name}", partial(mixed, x, guide, z, second, 0.25, None, tile)
