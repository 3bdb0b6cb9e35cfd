"""The launches of bottleneck_triton.py that are compiled ahead of time, without a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sffn_kernels.activation import Activation
from sffn_kernels.bottleneck_plain import Kept
from sffn_kernels.bottleneck_triton import (
    BACKWARD,
    build,
    stream_tilings,
    through,
    tilings,
    wide_backward,
)


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, launch) of every tiling, in bf16 on tensors without memory: what an ahead-of-time check
    compiles.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    t, h, f = 30_000, 2048, 8192
    low_rank = empty(t, 512), empty(f, 512), empty(512, f)
    block_dense = empty(t, 768), empty(f, 768), empty(4, 192, f // 4)
    block_shuffle = empty(t, 4, h // 4), empty(4, f // 4, h // 4), empty(4, h // 4, f // 4)
    gated = block_shuffle[0], empty(4, f // 2, h // 4), block_shuffle[2]
    shards: tuple[tuple[str, Activation, tuple[Tensor, Tensor, Tensor]], ...] = (
        ("low_rank", "gelu", low_rank),
        ("block_dense", "gelu_erf", block_dense),
        ("block_shuffle", "gelu", block_shuffle),
        ("block_shuffle", "swiglu", gated),
    )
    for kind, activation, (z, second, first) in shards:
        name = f"{kind} {activation}"
        rows = second.shape[:-1].numel()
        bias, grad = empty(rows), empty(t, first.shape[:-1].numel())
        kept = Kept(empty(t, 1, rows), empty(t, 1, f))  # as many elements, whatever L and K are
        for tile in tilings(activation):
            yield f"build, {name} {tile.name}", partial(build, z, second, bias, first, activation, tile)
        for tile in BACKWARD:
            for mode, held in (("backward", kept), ("rebuild", None)):
                yield (
                    f"{mode}, {name} {tile.name}",
                    partial(wide_backward, grad, z, second, bias, first, activation, held, tile),
                )
        for tile, outputs in stream_tilings(second, activation):
            short = z[..., : tile.k], second[..., : tile.k]
            yield (
                f"through, {name} {tile.name}",
                partial(through, *short, bias, first, activation, tile, outputs),
            )
