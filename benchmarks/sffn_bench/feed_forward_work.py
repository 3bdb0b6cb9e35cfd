"""Launches of a feed-forward layer's forward and backward pass on one rank, without a guide.

Standard library only.

Sizes: T tokens of the micro-batch, f inner width of the rank, F = f or 2f (gated). Between the linears:

    Megatron's code, also between        bias: read and write T F. GELU: T F, T f; its backward 3 T f.
    dense linears                        SwiGLU: three operations, 7 T f; their backward 13 T f in four
    sffn_kernels.bottleneck, plain torch GELU as above; SwiGLU 5 T f, backward 11 T f. The bias is added by
                                         the product before it, of a block factor in a pass of its own
    the same by Triton                   forward: one launch with the product before it writes both T F and
                                         T f. Backward: one launch with the gradient's product reads T F and
                                         writes T F
    recompute: bottleneck by Triton      forward: one launch from bottleneck to bottleneck reads and writes
                                         nothing wide; backward rebuilds both in one launch, a 24th of the
                                         tokens at a time

``kernels: auto`` takes whichever of both is predicted to be faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from sffn_bench.device_work import ELEMENT, DeviceRates, Work, again, passes, small, total_seconds
from sffn_dist.spec.feed_forward_activations import FeedForward, rebuilt_at_once
from sffn_dist.spec.split_table import ffn_linears, linear_tensors, wide_factor

# sffn_kernels.bottleneck_triton: inputs of a block that the streaming kernel holds at most (LONGEST), and the
# outputs that one of its programs sums (STREAMS, STREAMS_BLOCKS): fewer with blocks, or of few inputs
LONGEST = 512
OUTPUTS, FEWER_OUTPUTS, FEW = 256, 128, 128


@dataclass(frozen=True)
class Factor:
    """One factor of a linear on one rank: (blocks, outputs/blocks, inputs/blocks), one block of a matrix."""

    part: str
    tokens: int
    inputs: int
    outputs: int
    blocks: int
    weights: int
    flops: int  # of one of its three products

    def product(self, chunks: int = 1) -> Work:
        """One of its three products, as device_work.product with the factor's own weights and FLOPs.

        ``chunks`` of the tokens after one another move the weights as often.
        """
        moved = self.tokens * (self.inputs + self.outputs) + chunks * self.weights
        return Work(self.part, 1, moved * ELEMENT, self.flops)


class FeedForwardWork:
    """A feed-forward layer's launches; the config's ``kernels`` say which, ``auto`` by the device."""

    def __init__(self, layer: FeedForward, device: DeviceRates):
        self.layer, self.device = layer, device
        self.config, self.tokens = layer.part.config, layer.part.tokens
        self.inner = self.config.ffn_width // layer.part.ranks  # f
        self.outer = self.inner * (2 if self.config.gated else 1)  # F
        self.name = "dense FFN" if layer.structure.dense else "structured FFN"
        self.narrow = self.config.recompute == "bottleneck" and not layer.structure.dense
        self.between = f"{self.name} bias, activation"

    @cached_property
    def linears(self) -> tuple[list[Factor], list[Factor]]:
        """Factors of both linears, the one applied first before the other."""
        first, second = (self._factors(index) for index in range(2))
        return first, second

    def _factors(self, index: int) -> list[Factor]:
        part, structure = self.layer.part, self.layer.structure
        name, role, inputs, outputs = ffn_linears(self.config)[index]
        gated = self.config.gated and role == "column"
        specs = linear_tensors(structure, role, inputs, outputs, gated=gated)
        wide, p = wide_factor(specs), part.ranks
        own_inputs, own_outputs = (inputs, outputs // p) if role == "column" else (inputs // p, outputs)
        if structure.dense:
            ends = [own_inputs, own_outputs]
        else:
            width = structure.bottleneck(inputs, outputs)
            ends = [own_inputs, width, own_outputs]
        chunks = max(wide.block_groups(p)) + 1
        used = Fraction(
            structure.multiplications(inputs, outputs), sum(spec.numel for spec in specs.values())
        )
        made = []
        for place, (leaf, spec) in enumerate(specs.items()):
            reads, writes = ends[place : place + 2]
            if spec is wide and not structure.dense:  # of the bottleneck the rank's chunk
                reads, writes = (reads // chunks, writes) if role == "column" else (reads, writes // chunks)
            shape = spec.local_shape(p)
            tokens = part.tokens if spec is wide else part.own_tokens
            flops = int(2 * tokens * math.prod(shape) * used)
            blocks = shape[0] if len(shape) == 3 else 1
            label = f"{self.name} {name.removeprefix('linear_')} {leaf}"
            made.append(Factor(label, tokens, reads, writes, blocks, math.prod(shape), flops))
        return made

    # ---------------------------------------------------------------------------------------- between linears

    def _activation(self, *, ours: bool) -> Work:
        if not self.config.gated:
            return passes(self.between, self.tokens * self.inner, 2)
        count, launches = (5, 2) if ours else (7, 3)
        return passes(self.between, self.tokens * self.inner, count, launches)

    def _activation_backward(self, *, ours: bool) -> Work:
        if not self.config.gated:
            return passes(self.between, self.tokens * self.inner, 3)
        return passes(self.between, self.tokens * self.inner, 11 if ours else 13, 4)

    def _add_bias(self, *, fused: bool = False) -> Iterator[Work]:
        if self.config.model.bias and not fused:
            yield passes(self.between, self.tokens * self.outer, 2)

    def _bias_gradient(self) -> Iterator[Work]:
        if self.config.model.bias:
            yield passes(self.between, self.tokens * self.outer, 1)

    def _chosen(self, torch: list[Work], triton: list[Work]) -> list[Work]:
        """What ``kernels`` takes of two ways; an empty one is not there."""
        ways = {"torch": [torch], "triton": [triton], "auto": [torch, triton]}[self.config.kernels]
        return min(filter(None, ways), key=lambda way: total_seconds(way, self.device), default=torch)

    # --------------------------------------------------------------------------------------------- directions

    def forward(self) -> Iterator[Work]:
        """The forward pass."""
        first, second = self.linears
        if not self.layer.one_operation:
            yield from (factor.product() for factor in first)
            yield from self._add_bias()
            yield self._activation(ours=False)
            yield from (factor.product() for factor in second)
            return
        yield first[0].product()
        if self.narrow:
            yield from self._chosen(self._through_by_torch(), self._through_by_triton())
        else:
            yield from self._chosen([*self._widened(), self._activation(ours=True)], [self._built()])
            yield second[0].product()
        yield second[1].product()

    def backward(self) -> Iterator[Work]:
        """The backward pass, with what it rebuilds."""
        first, second = self.linears
        if not self.layer.one_operation:
            if self.narrow:
                yield from again([first[1].product(), *self._add_bias(), self._activation(ours=False)])
            yield from (factor.product().times(2) for factor in reversed(second))
            yield self._activation_backward(ours=False)
            yield from self._bias_gradient()
            yield from (factor.product().times(2) for factor in reversed(first))
            return
        yield second[1].product().times(2)
        slope = [
            second[0].product(self._chunks),
            self._activation_backward(ours=True),
            *self._bias_gradient(),
        ]
        if self.narrow:
            rebuilt = [*again(self._widened()), self._activation(ours=True), *slope]
            yield from self._by_chunks(self._chosen(rebuilt, self._rebuilt_by_triton()))
        else:
            yield from self._chosen(slope, self._slope_by_triton())
        products = [second[0].product(self._chunks), first[1].product(self._chunks).times(2)]
        yield from self._by_chunks(products)
        if self._chunks > 1:
            yield from self._summed()
        yield first[0].product().times(2)

    def _widened(self) -> list[Work]:
        """y by plain torch, which adds the bias of a matrix within the product."""
        factor = self.linears[0][1]
        return [factor.product(self._chunks), *self._add_bias(fused=factor.blocks == 1)]

    def _wide(self, features: int) -> int:
        """Bytes of so many features of all tokens."""
        return self.tokens * features * ELEMENT

    def _built(self) -> Work:
        """y and the activation's output by Triton."""
        made = replace(self.linears[0][1].product(), unit="triton")
        return replace(made, bytes=made.bytes + self._wide(self.inner))

    def _slope_by_triton(self) -> list[Work]:
        """dL/dy from that of the second linear's bottleneck and from y, and parts of the bias's."""
        made = replace(self.linears[1][0].product(), unit="triton")  # of which dL/da is not written
        moved = made.bytes + self._wide(2 * self.outer - self.inner)
        bias = [small(self.between, 1)] if self.config.model.bias else []
        return [replace(made, bytes=moved), *bias]

    def _rebuilt_by_triton(self) -> list[Work]:
        """dL/dy and the activation's output, from both bottlenecks."""
        up, down = (factor.product(self._chunks) for factor in (self.linears[0][1], self.linears[1][0]))
        moved = up.bytes + down.bytes  # y is not written, but dL/dy; dL/da is not written, but a
        bias = [small(self.between, 1)] if self.config.model.bias else []
        return [Work(down.part, 1, moved, up.flops + down.flops, "triton", up.flops), *bias]

    def _through_by_torch(self) -> list[Work]:
        down = self.linears[1][0].product(self._chunks)
        works = [*self._widened(), self._activation(ours=True), down]
        return [*self._by_chunks(works), *([small(self.between, 1)] if self._chunks > 1 else [])]

    def _through_by_triton(self) -> list[Work]:
        """From bottleneck to bottleneck; each program of other outputs makes the wide features anew."""
        up, down = self.linears[0][1], self.linears[1][0]
        reduced = up.inputs // up.blocks
        if reduced > LONGEST:
            return []
        most = FEWER_OUTPUTS if up.blocks > 1 or reduced <= FEW else OUTPUTS
        parts = -(-(down.outputs // down.blocks) // most)
        moved = self.tokens * (parts * up.inputs + down.outputs) + up.weights + down.weights
        flops = parts * up.flops + down.flops
        return [Work(down.part, 1, moved * ELEMENT, flops, "triton", (parts - 1) * up.flops)]

    # --------------------------------------------------------------------------------- some tokens at a time

    @cached_property
    def _chunks(self) -> int:
        """In which the wide features are rebuilt, or made where no kernel streams them."""
        return -(-self.tokens // rebuilt_at_once(self.tokens)) if self.narrow else 1

    def _by_chunks(self, works: list[Work]) -> list[Work]:
        """The same, a chunk of the tokens at a time."""
        return [replace(work, launches=work.launches * self._chunks) for work in works]

    def _summed(self) -> Iterator[Work]:
        """Gradients of both wide factors and of the bias, summed in fp32 over the chunks.

        4 bytes read and written and 2 read an element and chunk; at the end 4 read and 2 written.
        """
        summed, biased = (self.linears[0][1], self.linears[1][0]), self.config.model.bias
        elements = sum(factor.weights for factor in summed) + self.outer * biased
        tensors = len(summed) + biased
        part = f"{self.name} sums of weight gradients"
        yield Work(part, tensors * (self._chunks + 1), elements * (10 * self._chunks + 6))
