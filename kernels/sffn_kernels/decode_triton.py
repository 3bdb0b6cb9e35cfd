"""The Triton kernels of ``decode``.

A multiprocessor reads no faster than some 1% of a device's bandwidth, so a matrix of few rows is cut along
its *summed* features too. Each program reads a piece of the weights along their rows and multiplies it: the
weights are the left operand, the tokens, padded to 16 or more, the right one, since tensor cores have no
smaller shape. What the programs come to is added up as ``partial_sums_triton`` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sffn_kernels import activation as act
from sffn_kernels import bottleneck_plain as wide
from sffn_kernels.activation import ACTIVATIONS, Activation
from sffn_kernels.dispatch import Ways
from sffn_kernels.launching import Tile, capability, launch
from sffn_kernels.partial_sums_triton import cores, counters, last_of, shares, span, sum_of
from sffn_kernels.tiles_triton import value

# m rows of a weight and k of its columns at a time, for 2-byte elements; n, the tokens, is set by what comes
# (:func:`fitted`).
CONFIGS = (Tile(64, 16, 128, 4, 4), Tile(64, 16, 64, 4, 5), Tile(128, 16, 64, 8, 4))
# m wide features at a time, and k of the bottleneck's: summed over by U, then written by V.
BOTTLENECK_CONFIGS = (Tile(64, 16, 64, 4, 3), Tile(64, 16, 64, 8, 2))
FEW_FEATURES = Tile(
    32, 16, 64, 4, 3
)  # one more, but for block_shuffle: V's columns, L apart, then leave too few registers

# On compute capability 10.0 (B200) those spill registers at 64 tokens (triton 3.7.1 or 3.9.0).
BOTTLENECK_CONFIGS_10 = (Tile(64, 16, 32, 8, 3),)
FEW_FEATURES_10 = Tile(32, 16, 64, 8, 3)

TOKENS_HELD = 4096  # n times k
PROGRAMS_PER_CORE = 2
SCRATCH = 1 << 24  # bytes of a bottleneck's partial sums up to which its features are cut further
REACH = 4096  # partial sums, rows times tokens, that a program of a bottleneck hands over in one piece

# ---------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _product(
    x, weight, bias, out, scratch, counters, T, O, I, share, xt, xk, xi, wk, wo, wi, bk, bo, yt, yk, yo,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Program (tile of M rows, block k, split): a share of the I summed features.

    Scratch (K, tiles, splits, T, M).
    """
    tile, k, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, piece = tl.num_programs(2), k * tl.num_programs(0) + tile
    m, tokens, i = tl.arange(0, M), tl.arange(0, N), split * share + tl.arange(0, K)
    w_at = weight + k.to(tl.int64) * wk + (tile * M).to(tl.int64) * wo + (m[:, None] * wo + i[None, :] * wi)
    x_at = x + k.to(tl.int64) * xk + tokens.to(tl.int64)[None, :] * xt + i[:, None] * xi
    acc = tl.zeros((M, N), tl.float32)
    for step in range(tl.cdiv(tl.minimum(share, I - split * share), K)):
        inside = i + step * K < I
        w = tl.load(w_at, mask=(m < O - tile * M)[:, None] & inside[None, :], other=0.0)
        read = tl.load(x_at, mask=inside[:, None] & (tokens < T)[None, :], other=0.0)
        acc = tl.dot(w, read, acc, input_precision="ieee")
        w_at += K * wi
        x_at += K * xi
    own = scratch + piece * splits * T * M
    tl.store(own + ((split * T + tokens)[None, :] * M + m[:, None]), acc, mask=(tokens < T)[None, :])
    if last_of(counters + piece, splits):
        for start in range(0, T * M, SPAN):
            e = start + tl.arange(0, SPAN)
            row = tile * M + e % M
            valid = (e < T * M) & (row < O)
            y = sum_of(own, splits, T * M, e, valid, SPAN)
            if bias is not None:
                y += tl.load(bias + k * bk + row * bo, mask=valid, other=0.0).to(tl.float32)
            tl.store(out + (e // M) * yt + k * yk + row * yo, y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _features(
    z, second, bias, T, R, s, n, tokens, zt, zr, us, ur, bs,
    ACTIVATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Wide features s < n of a block of V by tokens, (M, N) in fp32.

    ``second`` points to the row of the first of them.
    """
    away = n * tl.num_programs(1)  # features from a gate to what it multiplies
    y, up = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    u_at = second + tl.arange(0, M)[:, None] * us
    z_at = z + tokens.to(tl.int64)[None, :] * zt
    for start in range(0, R, K):
        r = start + tl.arange(0, K)
        mask = (s < n)[:, None] & (r < R)[None, :]
        read = tl.load(z_at + r[:, None] * zr, mask=(r < R)[:, None] & (tokens < T)[None, :], other=0.0)
        y = tl.dot(tl.load(u_at + r[None, :] * ur, mask=mask, other=0.0), read, y, input_precision="ieee")
        if ACTIVATION == "swiglu":
            u = tl.load(u_at + away.to(tl.int64) * us + r[None, :] * ur, mask=mask, other=0.0)
            up = tl.dot(u, read, up, input_precision="ieee")
    if bias is not None:
        y += tl.load(bias + s * bs, mask=s < n, other=0.0).to(tl.float32)[:, None]
        if ACTIVATION == "swiglu":
            up += tl.load(bias + (s + away) * bs, mask=s < n, other=0.0).to(tl.float32)[:, None]
    made = value(y, ACTIVATION)
    if ACTIVATION == "swiglu":
        made *= up
    return made


@triton.jit
def _hand_over(
    pieces, counters, out, T, O, slot, slots, group, stride, yt,
    REACH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Count in a slot's piece.

    The last of a group sums the group's into its first, the last group's sums the groups' into out.
    """
    mine, groups = slot // group, tl.cdiv(slots, group)
    head = pieces + mine * group * stride
    members = tl.minimum(group, slots - mine * group)
    if last_of(counters + mine, members):
        for start in range(0, T * REACH, SPAN):
            e = start + tl.arange(0, SPAN)
            valid = (e < T * REACH) & (e % REACH < O)
            tl.store(head + e, sum_of(head, members, stride, e, valid, SPAN), mask=valid)
        if last_of(counters + groups, groups):
            for start in range(0, T * REACH, SPAN):
                e = start + tl.arange(0, SPAN)
                valid = (e < T * REACH) & (e % REACH < O)
                total = sum_of(pieces, groups, group * stride, e, valid, SPAN)
                tl.store(out + (e // REACH) * yt + e % REACH, total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _bottleneck(
    z, second, bias, first, out, scratch, counters, T, O, R, L, n, share, group,
    zt, zl, zr, ul, us, ur, bl, bs, vk, vo, vl, vs, yt, yk, ACTIVATION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, REACH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Program (slot, k): a share of the n wide features that block l of U writes for block k of V.

    Scratch (slots, K, chunks, T, REACH).

    The slots of all l that read the same columns of V, L apart, are neighbours: they meet in the L2 cache.
    Each goes through the chunks of REACH outputs from another one on, so that the last in one chunk is seldom
    the last in all.
    """
    slot, k = tl.program_id(0), tl.program_id(1)
    slots, chunks, l = tl.num_programs(0), tl.cdiv(O, REACH), slot % L
    begin = slot // L * share
    end = tl.minimum(begin + share, n)
    stride = tl.num_programs(1) * chunks * T * REACH
    tokens, shift = tl.arange(0, N), (k * n).to(tl.int64)
    z_l, u_l = z + l.to(tl.int64) * zl, second + l.to(tl.int64) * ul
    v = first + k.to(tl.int64) * vk + l * vl
    if bias is not None:
        bias += l * bl + shift * bs
    for start in range(begin, end, M):
        s = start + tl.arange(0, M)
        u = u_l + (shift + start) * us
        a = _features(z_l, u, bias, T, R, s, n, tokens, zt, zr, us, ur, bs, ACTIVATION, M, N, K).to(
            first.dtype.element_ty
        )
        summed = tl.where(start > begin, T, 0)  # tokens of which features before gave sums
        tl.debug_barrier()  # those that other threads of this program wrote are read below
        for step in range(chunks):
            chunk = (step + slot) % chunks
            pieces = scratch + (k * chunks + chunk) * T * REACH
            left = O - chunk * REACH
            for o in range(0, tl.minimum(left, REACH), K):
                rows = o + tl.arange(0, K)
                inside = (rows < left)[:, None]
                v_at = (
                    v
                    + (chunk * REACH + o).to(tl.int64) * vo
                    + (tl.arange(0, K)[:, None] * vo + s[None, :] * vs)
                )
                acc = tl.dot(
                    tl.load(v_at, mask=inside & (s < n)[None, :], other=0.0), a, input_precision="ieee"
                )
                at = pieces + slot * stride + (tokens[None, :] * REACH + rows[:, None])
                acc += tl.load(at, mask=inside & (tokens < summed)[None, :], other=0.0)
                tl.store(at, acc, mask=inside & (tokens < T)[None, :])
            if start + M >= end:
                counted = counters + (k * chunks + chunk) * (tl.cdiv(slots, group) + 1)
                to = out + k * yk + chunk * REACH
                _hand_over(pieces, counted, to, T, left, slot, slots, group, stride, yt, REACH, SPAN)


# --------------------------------------------------------------------------------------------------- launches


def fitted(configs: tuple[Tile, ...], tokens: int, itemsize: int) -> dict[str, Tile]:
    """Tilings for so many tokens, by name; of wider elements, and of more tokens, fewer columns at a time."""
    n = max(16, triton.next_power_of_2(tokens))
    tiles = [replace(tile, n=n, k=min(tile.k * 2 // itemsize, TOKENS_HELD // n)) for tile in configs]
    return {tile.name: tile for tile in tiles}


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()


def products(x: Tensor, weight: Tensor, bias: Tensor | None, *, interleaved: bool) -> Ways[Tensor]:
    """x (T, K, I), weight (K, O, I), bias (K*O,) -> (T, K*O), by each tiling; see ``decode.product``."""
    tiles = fitted(CONFIGS, x.shape[0], x.element_size())
    return {name: partial(_run_product, x, weight, bias, interleaved, tile) for name, tile in tiles.items()}


def _run_product(x: Tensor, weight: Tensor, bias: Tensor | None, interleaved: bool, tile: Tile) -> Tensor:
    tokens, blocks, inputs = x.shape
    outputs = weight.shape[1]
    tiles = triton.cdiv(outputs, tile.m)
    each, splits = shares(
        triton.cdiv(inputs, tile.k), triton.cdiv(PROGRAMS_PER_CORE * cores(x.device), tiles * blocks)
    )
    out = x.new_empty(tokens, blocks * outputs)

    def by_block(features: Tensor) -> Tensor:  # (..., K, O)
        return (
            features.unflatten(-1, (outputs, blocks)).mT
            if interleaved
            else features.unflatten(-1, (blocks, outputs))
        )

    b = None if bias is None else by_block(bias)
    scratch = torch.empty(blocks * tiles * splits * tokens * tile.m, dtype=torch.float32, device=x.device)
    launch(
        _product, (tiles, blocks, splits), x, weight, b, out, scratch, counters(x.device, blocks * tiles),
        tokens, outputs, inputs, each * tile.k,
        *x.stride(), *weight.stride(), *_strides(b, 2), *by_block(out).stride(),
        M=tile.m, N=tile.n, K=tile.k, SPAN=span(tokens * tile.m), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out


def bottlenecks(
    z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation
) -> Ways[Tensor]:
    """Out (T, O) by each tiling; see ``decode.bottleneck``."""
    tiles = fitted(bottleneck_configs(second), z.shape[0], z.element_size())
    return {
        name: partial(_run_bottleneck, z, second, bias, first, activation, tile)
        for name, tile in tiles.items()
    }


def bottleneck_configs(second: Tensor) -> tuple[Tile, ...]:
    """The tilings of :func:`bottlenecks` on the device of ``second``, for weights with blocks or without."""
    on_10 = capability(second.device) == 10
    configs, few = (BOTTLENECK_CONFIGS_10, FEW_FEATURES_10) if on_10 else (BOTTLENECK_CONFIGS, FEW_FEATURES)
    return configs if second.dim() == 3 else (*configs, few)


def _run_bottleneck(
    z: Tensor, second: Tensor, bias: Tensor | None, first: Tensor, activation: Activation, tile: Tile
) -> Tensor:
    z, u = z if z.dim() == 3 else z.unsqueeze(1), wide.grouped(second)
    tokens, written, inputs = z.shape
    v = wide.columns(first, written)
    blocks, outputs, _, n = v.shape
    b = None if bias is None else wide.kept_bias(bias, written)
    wanted = triton.cdiv(PROGRAMS_PER_CORE * cores(z.device), blocks * written)
    each, parts = shares(
        triton.cdiv(n, tile.m), min(wanted, SCRATCH // (4 * written * tokens * blocks * outputs))
    )
    slots = written * parts
    group = math.isqrt(slots - 1) + 1  # the sums of the groups, then that of their sums, take the same time
    reach = min(triton.next_power_of_2(outputs), REACH // triton.next_power_of_2(tokens))
    reach = max(reach, tile.k)
    pieces = blocks * triton.cdiv(outputs, reach)
    scratch = torch.empty(slots * pieces * tokens * reach, dtype=torch.float32, device=z.device)
    out = z.new_empty(tokens, blocks, outputs)
    launch(
        _bottleneck, (slots, blocks), z, u, b, v, out, scratch,
        counters(z.device, pieces * (triton.cdiv(slots, group) + 1)),
        tokens, outputs, inputs, written, n, each * tile.m, group,
        *z.stride(), *u.stride(), *_strides(b, 2), *v.stride(), *out.stride()[:2], ACTIVATION=activation,
        M=tile.m, N=tile.n, K=tile.k, REACH=reach, SPAN=span(tokens * reach),
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out.flatten(1)


# ---------------------------------------------------------------------------------------------------- shipped


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and launches within ``launching.compiling`` of each kernel with each tiling, at a large
    model's sizes in bf16.
    """
    meta = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    h, f, rank, blocks = 4096, 16384, 1024, 4
    for tokens in (1, 16, 64):
        dense, dealt = meta(tokens, 1, h), meta(tokens, rank // blocks, blocks).mT
        given = {
            "product": products(dense, meta(1, rank, h), None, interleaved=False),
            "product_interleaved": products(
                dealt, meta(blocks, h // blocks, rank // blocks), meta(h), interleaved=True
            ),
            "bottleneck_blocks": bottlenecks(
                dealt,
                meta(blocks, f // blocks, rank // blocks),
                meta(f),
                meta(blocks, rank // blocks, f // blocks),
                "gelu",
            ),
        }
        for activation in ACTIVATIONS:
            second = meta(f * act.halves(activation), rank)
            given[f"bottleneck_{activation}"] = bottlenecks(
                meta(tokens, rank), second, None, meta(rank, f), activation
            )
        for name, ways in given.items():
            yield from ((f"decode_{name} {tokens} tokens {tile}", way) for tile, way in ways.items())
