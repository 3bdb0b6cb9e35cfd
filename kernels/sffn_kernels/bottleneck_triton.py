"""From bottleneck to bottleneck by Triton (see bottleneck.py for the formula and the shapes).

    through   z -> out              the wide features are streamed through the chip, as attention kernels
                                    stream keys: none is written to memory
    wide      z -> y, a             forward, keeping what backward needs: second factor, bias and activation
                                    in one pass
              y, dout -> dy, db     backward of the same: dL/da, times the activation's slope as it leaves
                                    the product
              z, dout -> a, dy, db  backward where nothing was kept: y and dL/da are rebuilt side by side and
                                    never written

Grids and strides are those of L blocks of U, K blocks of V and runs of J = f/(K L) features, which one block
of U writes and one of V reads; (L, K) is (1, 1) for low_rank, (1, K) for block_dense, (L, K) for
block_shuffle. Gated: a block of U has its gates' rows first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sffn_kernels import bottleneck_plain as plain
from sffn_kernels.activation import Activation, halves
from sffn_kernels.bottleneck_plain import Kept
from sffn_kernels.launching import Tile, capability, launch
from sffn_kernels.tiles_triton import accumulate, in_groups, precision, slope, strides, value

# Of wide: tokens x features, k of R or O/K at a time. With more than one product in a program (backward,
# gated) a larger tile spills registers.
FORWARD = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 128, 64, 4, 3))
BACKWARD = (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3))
# Of through: tokens x features streamed at a time, and R at most; with it the outputs that a program sums in
# its registers. More outputs go to other programs, each of which makes the wide features anew. What is here
# spills no register, with blocks in U (L > 1) or without.
STREAMS = ((Tile(64, 32, 128, 4, 3), 128), (Tile(64, 32, 256, 8, 2), 256), (Tile(64, 32, 512, 8, 2), 256))
STREAMS_BLOCKS = (
    (Tile(64, 32, 128, 4, 2), 128),
    (Tile(64, 32, 256, 8, 2), 128),
    (Tile(64, 16, 512, 8, 2), 128),
)
# On compute capability 10.0 (B200) those of STREAMS_BLOCKS with two stages spill up to 7 KB;
# with one stage, and less at a time, none spills with triton 3.7.1 and 3.9.0. Their speed was not measured.
STREAMS_BLOCKS_10 = (*STREAMS_BLOCKS[:2], (Tile(64, 16, 512, 8, 1), 128))
STREAMS_BLOCKS_GATED_10 = (
    (Tile(64, 32, 128, 8, 2), 128),
    (Tile(64, 16, 256, 8, 1), 128),
    (Tile(64, 16, 512, 8, 1), 64),
)
LONGEST = 512  # R


@triton.jit
def _wide(  # noqa: C901  its three modes are chosen at compile time
    z, second, bias, first, grad, y, features, grad_y, bias_parts,
    T, J, R, O,  # tokens, features of a run, inputs of U's block, outputs of V's
    L, K,
    z_t, z_l, z_r, u_l, u_s, u_r, g_t, g_k, g_o, v_k, v_o, v_l,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACTIVATION: tl.constexpr, BUILD: tl.constexpr, BACKWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(J, BN)
    row, column = in_groups(tl.program_id(0), tl.cdiv(T, BM), L * K * tiles, 8)
    run, tile = column // tiles, column % tiles
    l, k = (run // K).to(tl.int64), (run % K).to(tl.int64)
    t, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    rows, columns = t < T - row * BM, j < J - tile * BN
    start, half = (row * BM).to(tl.int64), K * J  # features of a block of U
    s = k * J + tile * BN  # the first one of this tile, within its block
    gated: tl.constexpr = ACTIVATION == "swiglu"
    ROWS = 2 * half if gated else half  # of a block of U
    features += start * L * half + (k * L + l) * J + tile * BN + (t * (L * half) + j)
    wide = start * L * ROWS + l * ROWS + s + (t * (L * ROWS) + j)
    y += wide
    if BUILD:
        left = z + l * z_l + start * z_t + t * z_t
        right = second + l * u_l + s * u_s + j * u_s
        bias += l * ROWS + s + j
        up = tl.zeros((BM, BN), tl.float32)
        up = accumulate(up, left, right, rows, columns, R, z_r, u_r, BK, PRECISION)
        if HAS_BIAS:
            up += tl.load(bias, mask=columns, other=0.0).to(tl.float32)
        if gated:
            gate = up
            up = tl.zeros((BM, BN), tl.float32)
            up = accumulate(
                up, left, right + half.to(tl.int64) * u_s, rows, columns, R, z_r, u_r, BK, PRECISION
            )
            if HAS_BIAS:
                up += tl.load(bias + half, mask=columns, other=0.0).to(tl.float32)
    else:
        up = tl.load(y, mask=rows & columns, other=0.0).to(tl.float32)
        if gated:
            gate = up
            up = tl.load(y + half, mask=rows & columns, other=0.0).to(tl.float32)
    if gated:
        opened = value(gate, ACTIVATION)
        made = opened * up
    else:
        made = value(up, ACTIVATION)
    kind = features.dtype.element_ty
    if BUILD:
        tl.store(features, made.to(kind), mask=rows & columns)
    if BACKWARD:
        came = tl.zeros((BM, BN), tl.float32)
        left = grad + k * g_k + start * g_t + t * g_t
        right = first + k * v_k + l * v_l + (tile * BN + j)
        came = accumulate(came, left, right, rows, columns, O, g_o, v_o, BK, PRECISION)
        grad_y += wide
        parts = bias_parts + row.to(tl.int64) * (L * ROWS) + l * ROWS + s + j
        if gated:
            of_up = came * opened
            came = came * up * slope(gate, ACTIVATION)
            tl.store(grad_y + half, of_up.to(kind), mask=rows & columns)
            if HAS_BIAS:
                tl.store(parts + half, tl.sum(of_up, 0)[None, :], mask=columns)
        else:
            came = came * slope(up, ACTIVATION)
        tl.store(grad_y, came.to(kind), mask=rows & columns)
        if HAS_BIAS:
            tl.store(parts, tl.sum(came, 0)[None, :], mask=columns)
    else:
        if gated:
            tl.store(y, gate.to(kind), mask=rows & columns)
            tl.store(y + half, up.to(kind), mask=rows & columns)
        else:
            tl.store(y, up.to(kind), mask=rows & columns)


@triton.jit
def _through(
    z, second, bias, first, out,
    T, J, R, O,
    L, K,
    z_t, z_l, z_r, u_l, u_s, u_r, v_k, v_o, v_l, out_t, out_k, out_o,
    BM: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(O, BO)
    # programs that read the same weights follow one another
    row, column = tl.program_id(0) % tl.cdiv(T, BM), tl.program_id(0) // tl.cdiv(T, BM)
    k, part = (column // parts).to(tl.int64), column % parts * BO
    t, r, o, j = tl.arange(0, BM)[:, None], tl.arange(0, BR), tl.arange(0, BO)[None, :], tl.arange(0, BF)
    begin, half = (row * BM).to(tl.int64), K * J
    rows, outputs = t < T - row * BM, o < O - part
    gated: tl.constexpr = ACTIVATION == "swiglu"
    ROWS = 2 * half if gated else half
    z += begin * z_t
    first += k * v_k + part.to(tl.int64) * v_o
    acc = tl.zeros((BM, BO), tl.float32)
    second += k * J * u_s
    bias += k * J
    for _ in range(L):
        left = tl.load(
            z + (t * z_t + r[None, :] * z_r), mask=rows & (r < R)[None, :], other=0.0
        )  # stays on the chip
        for start in range(0, J, BF):
            here = j < J - start
            some = here[None, :] & (r < R)[:, None]
            weights = second + start * u_s + (j[None, :] * u_s + r[:, None] * u_r)  # (BR, BF)
            up = tl.dot(left, tl.load(weights, mask=some, other=0.0), input_precision=PRECISION)
            if HAS_BIAS:
                up += tl.load(bias + start + j, mask=here, other=0.0).to(tl.float32)[None, :]
            if gated:
                gate = up
                up = tl.dot(
                    left,
                    tl.load(weights + half.to(tl.int64) * u_s, mask=some, other=0.0),
                    input_precision=PRECISION,
                )
                if HAS_BIAS:
                    up += tl.load(bias + half + start + j, mask=here, other=0.0).to(tl.float32)[None, :]
                made = value(gate, ACTIVATION) * up
            else:
                made = value(up, ACTIVATION)
            columns = first + start + (o * v_o + j[:, None])  # (BF, BO)
            right = tl.load(columns, mask=here[:, None] & outputs, other=0.0)
            acc = tl.dot(made.to(left.dtype), right, acc, input_precision=PRECISION)
        z += z_l
        second += u_l
        bias += ROWS
        first += v_l
    out += begin * out_t + k * out_k + part * out_o + (t * out_t + o * out_o)
    tl.store(out, acc.to(out.dtype.element_ty), mask=rows & outputs)


class _Sizes:
    """What the kernels are told of a shard, from its tensors."""

    def __init__(self, z: Tensor, second: Tensor, first: Tensor, activation: Activation):
        self.z = plain.by_block(z)  # (L, T, R)
        self.second = plain.grouped(second)  # (L, F/L, R)
        self.blocks, rows, self.reduced = self.second.shape
        # (K, O/K, L, J); every L-th column would be read two bytes at a time, so where L > 1 the weight, not
        # what T tokens have, is copied
        self.first = plain.columns(first, self.blocks).contiguous()
        self.k, self.outputs, _, self.run = self.first.shape
        self.tokens = self.z.shape[1]
        self.rows = self.blocks * rows  # F
        self.features = self.rows // halves(activation)
        z_l, z_t, z_r = strides(self.z)
        self.of_z, self.of_u, self.of_v = (
            (z_t, z_l, z_r),
            strides(self.second),
            strides(self.first)[:3],
        )  # J is contiguous


def _run_wide(
    sizes: _Sizes,
    bias: Tensor | None,
    grad: Tensor | None,
    kept: Kept | None,
    activation: Activation,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, features, dy, db): what a mode does not write is an empty stand-in."""
    like, tokens = sizes.z, sizes.tokens
    nothing = like.new_empty(0)
    of_y, of_features = (
        (tokens, sizes.blocks, sizes.rows // sizes.blocks),
        (tokens, sizes.k, sizes.features // sizes.k),
    )
    backward = grad is not None
    y, features = kept or (nothing if backward else like.new_empty(of_y), like.new_empty(of_features))
    grad_y = like.new_empty(of_y) if backward else nothing
    rows = triton.cdiv(tokens, tile.m)
    with_bias = bias is not None
    parts = (
        torch.empty(rows, sizes.rows, dtype=torch.float32, device=like.device)
        if backward and with_bias
        else nothing
    )
    sent = nothing.view(0, 1, 1) if grad is None else grad.unflatten(-1, (sizes.k, -1))
    own_bias = nothing if bias is None else plain.kept_bias(bias, sizes.blocks).contiguous()
    grid = (rows * sizes.blocks * sizes.k * triton.cdiv(sizes.run, tile.n),)
    shape = (tokens, sizes.run, sizes.reduced, sizes.outputs, sizes.blocks, sizes.k)
    given = (*sizes.of_z, *sizes.of_u, *strides(sent), *sizes.of_v)
    tensors = (sizes.z, sizes.second, own_bias, sizes.first, sent, y, features, grad_y, parts)
    constants = {
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "PRECISION": precision(like.dtype),
        "ACTIVATION": activation,
    }
    modes = {"BUILD": kept is None, "BACKWARD": backward, "HAS_BIAS": with_bias}
    launch(_wide, grid, *tensors, *shape, *given, warps=tile.warps, stages=tile.stages, **constants, **modes)
    if not (backward and with_bias):
        return y, features, grad_y, None
    grad_bias = parts.sum(0).view(sizes.blocks, -1).t().reshape(-1)  # from (l, s) to s*L + l
    return y, features, grad_y, grad_bias.to(like.dtype)


def tilings(activation: Activation) -> tuple[Tile, ...]:
    """Those of :func:`build`."""
    return BACKWARD if activation == "swiglu" else FORWARD


def build(
    z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation, tile: Tile
) -> Kept:
    """y = U z + b and activation(y) in one pass."""
    y, features, _, _ = _run_wide(_Sizes(z, second, first, activation), bias, None, None, activation, tile)
    return Kept(y, features)


def wide_backward(
    grad: Tensor,
    z: Tensor,
    second: Tensor,
    bias: Tensor | None,
    first: Tensor,
    activation: Activation,
    kept: Kept | None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a, dy, db) from dL/dout, with y as it was kept or rebuilt on the way."""
    _, features, grad_y, grad_bias = _run_wide(
        _Sizes(z, second, first, activation), bias, grad, kept, activation, tile
    )
    return features, grad_y, grad_bias


def _power(size: int) -> int:
    """The power of two that holds a size, at least 16: what tl.dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def holds(z: Tensor) -> bool:
    """True where a chip holds the tiles of :func:`through`: fp32 needs twice their room."""
    return z.element_size() == 2 or not z.is_cuda


def stream_tilings(second: Tensor, activation: Activation) -> tuple[tuple[Tile, int], ...]:
    """Those of :func:`through` on the device of ``second``, for weights with blocks or without."""
    if second.dim() == 2:
        return STREAMS
    if capability(second.device) != 10:
        return STREAMS_BLOCKS
    return STREAMS_BLOCKS_GATED_10 if activation == "swiglu" else STREAMS_BLOCKS_10


def streams(second: Tensor, activation: Activation) -> Iterator[tuple[Tile, int]]:
    """The tilings of :func:`through` that take these weights, the best fitting first.

    None if R is above LONGEST.
    """
    tilings_here = stream_tilings(second, activation)
    return ((tile, outputs) for tile, outputs in tilings_here if second.shape[-1] <= tile.k)


def through(
    z: Tensor,
    second: Tensor,
    bias: Tensor | None,
    first: Tensor,
    activation: Activation,
    tile: Tile,
    outputs: int,
) -> Tensor:
    """Out (T, O) without a wide feature in memory; R at most ``tile.k``."""
    sizes = _Sizes(z, second, first, activation)
    assert sizes.reduced <= tile.k
    out = z.new_empty(sizes.tokens, sizes.k, sizes.outputs)
    own_bias = z.new_empty(0) if bias is None else plain.kept_bias(bias, sizes.blocks).contiguous()
    columns = min(outputs, _power(sizes.outputs))
    grid = (triton.cdiv(sizes.tokens, tile.m) * sizes.k * triton.cdiv(sizes.outputs, columns),)
    shape = (sizes.tokens, sizes.run, sizes.reduced, sizes.outputs, sizes.blocks, sizes.k)
    given = (*sizes.of_z, *sizes.of_u, *sizes.of_v, *strides(out))
    constants = {
        "BM": tile.m,
        "BF": tile.n,
        "BR": _power(sizes.reduced),
        "BO": columns,
        "PRECISION": precision(z.dtype),
    }
    modes = {"ACTIVATION": activation, "HAS_BIAS": bias is not None}
    tensors = (sizes.z, sizes.second, own_bias, sizes.first, out)
    launch(
        _through, grid, *tensors, *shape, *given, warps=tile.warps, stages=tile.stages, **constants, **modes
    )
    return out.flatten(1)
