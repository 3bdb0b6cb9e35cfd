"""The sizes that feed-forward layers are timed at, and the least that computing one takes.

Standard library only.

h width, f = 4 h inner width, B blocks. The paper's sizes by their share of the dense layer's parameters, and
the exact share of weights:

                     32%                      63%
    low_rank         rank h/4       0.3125    rank h/2       0.625
    block_dense      rank 3h/8, B 4 0.2930    rank 3h/4, B 4 0.5859
    block_shuffle    B 4            0.3125    B 2            0.625
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from sffn_dist.structured.dense import Dense
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure

Mode = Literal["forward", "forward_backward", "training"]
KINDS = ("low_rank", "block_dense", "block_shuffle")
# share in percent -> kind -> rank as a part of h, blocks
SIZES: dict[int, dict[str, tuple[Fraction | None, int | None]]] = {
    32: {"low_rank": (Fraction(1, 4), None), "block_dense": (Fraction(3, 8), 4), "block_shuffle": (None, 4)},
    63: {"low_rank": (Fraction(1, 2), None), "block_dense": (Fraction(3, 4), 4), "block_shuffle": (None, 2)},
}
# (share in percent, kind) -> how many times faster than the compiled dense layer, forward + backward at
# h = 2048 on CUDA, a layer is to be
AIMED_AT = {
    (32, "low_rank"): 2.8,
    (32, "block_dense"): 2.8,
    (32, "block_shuffle"): 2.5,
    (63, "low_rank"): 1.5,
    (63, "block_dense"): 1.5,
    (63, "block_shuffle"): 1.4,
}
DECODING_AIMED_AT = 2.2  # times faster than dense, at 32%
MOST_DECODED = 64  # tokens that sffn_kernels.decode takes


@dataclass(frozen=True)
class Layer:
    """y = W2 gelu(W1 x + b1) + b2 with W1 (4h, h) and W2 (h, 4h) of one structure."""

    structure: Structure
    width: int

    @property
    def inner(self) -> int:
        return 4 * self.width

    @property
    def weights(self) -> int:
        """Elements of both linears' factors, biases not counted."""
        h, f = self.width, self.inner
        shapes = [*self.structure.factor_shapes(h, f).values(), *self.structure.factor_shapes(f, h).values()]
        return sum(map(math.prod, shapes))

    @property
    def parameters(self) -> int:
        return self.weights + self.inner + self.width

    def columns(self, tokens: int) -> dict[str, Any]:
        """What a benchmark row says of the layer; ``share``: its weights over the dense layer's."""
        share = self.weights / (2 * self.width * self.inner)
        sizes = {"rank": self.structure.rank, "blocks": self.structure.blocks}
        named = {"kind": self.structure.kind, "share": round(share, 4), "tokens": tokens}
        return {**named, "width": self.width, "inner": self.inner, **sizes}


def layer(kind: str, share: int, width: int) -> Layer:
    """The paper's layer. Raises ValueError for a width that its rank or blocks do not divide."""
    rank, blocks = SIZES[share][kind]
    step = math.lcm(
        (rank / (blocks or 1)).denominator if rank else 1, blocks or 1
    )  # whole ranks, the same in each block
    if width % step:
        raise ValueError(
            f"--width {width}: must be divisible by {step} for {kind} with {share}% of the parameters"
        )
    return Layer(build_structure(kind, int(rank * width) if rank else None, blocks), width)


def layers(width: int, kinds: Sequence[str], shares: Sequence[int]) -> list[Layer]:
    """The dense layer, then every kind at every share. Raises ValueError as :func:`layer` does."""
    return [Layer(Dense(), width), *(layer(kind, share, width) for kind in kinds for share in shares)]


def chosen(rank: int, block_rank: int, blocks: int) -> list[Structure]:
    """One structure of each kind by the sizes of a command line; ``block_rank`` is block_dense's."""
    return [
        build_structure("low_rank", rank=rank),
        build_structure("block_dense", rank=block_rank, blocks=blocks),
        build_structure("block_shuffle", blocks=blocks),
    ]


def odd_widths(widths: Sequence[int], kinds: Sequence[str], shares: Sequence[int]) -> Iterator[str]:
    """What widths do not fit the kinds and shares."""
    for width in widths:
        for kind in kinds:
            for share in shares:
                try:
                    layer(kind, share, width)
                except ValueError as error:
                    yield str(error)


def work(of: Layer, tokens: int, mode: Mode, element: int) -> tuple[int, int]:
    """(FLOPs, bytes) that no implementation of the layer goes below; ``element`` is the bytes of a number.

    With W weights, P parameters and T tokens::

                            FLOPs   numbers         read (in) and written (out)
        forward             2 T W   P + 2 T h       parameters, x in; y out
        forward_backward    6 T W   2 P + 4 T h     parameters, x, dy in; y, dx, dP out
        training            6 T W   9 P + 4 T h     these, then AdamW: dP, P and both moments in;
                                                    P and both moments out

    Elementwise operations count for nothing, and what passes between the two linears may stay on the chip.
    """
    flops = 2 * tokens * of.weights * (1 if mode == "forward" else 3)
    of_parameters, of_tokens = {"forward": (1, 2), "forward_backward": (2, 4), "training": (9, 4)}[mode]
    return flops, element * (of_parameters * of.parameters + of_tokens * tokens * of.width)
