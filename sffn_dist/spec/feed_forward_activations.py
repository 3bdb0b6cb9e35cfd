"""What a feed-forward layer holds of a micro-batch on one rank.

activations.py has the sizes by name and puts them together. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from sffn_dist.spec.layer_activations import MicroBatch
from sffn_dist.spec.split_table import ffn_linears, linear_tensors, wide_factor
from sffn_dist.structured.cut import TensorSpec
from sffn_dist.structured.structure import Structure


def rebuilt_at_once(tokens: int) -> int:
    """Tokens whose wide features ``recompute: bottleneck`` holds at a time while no guide takes part:
    sffn_kernels.bottleneck.at_a_time.
    """
    return max(1024, -(-tokens // 24))


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer of a structure: what it keeps beside its input, and what its backward pass makes.

    All in bytes.
    """

    part: MicroBatch
    structure: Structure

    @cached_property
    def _specs(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Of both linears' tensors."""
        config, guide = self.part.config, self.part.guide
        first, second = (
            linear_tensors(
                self.structure,
                role,
                inputs,
                outputs,
                gated=config.gated and role == "column",
                guide=guide,
            )
            for _, role, inputs, outputs in ffn_linears(config)
        )
        return first, second

    def _weight(self, linear: int, *, wide: bool | None = None) -> int:
        """Bytes of a linear's weights on this rank, or of its wide factor, or of all but that."""
        specs = self._specs[linear]
        chosen = [
            spec
            for name, spec in specs.items()
            if wide is None or (name != "guide" and (spec is wide_factor(specs)) == wide)
        ]
        return self.part.element * sum(math.prod(spec.local_shape(self.part.ranks)) for spec in chosen)

    @property
    def _inner(self) -> int:
        """The rank's part of f."""
        return self.part.config.ffn_width // self.part.ranks

    @property
    def _outer(self) -> int:
        """The rank's part of F."""
        return self._inner * (2 if self.part.config.gated else 1)

    def _chunk(self, linear: int) -> int:
        """The rank's features of a wide bottleneck."""
        h, f = self.part.config.model.width, self.part.config.ffn_width
        width = self.structure.bottleneck(f, h) if linear else self.structure.bottleneck(h, f)
        groups = wide_factor(self._specs[linear]).block_groups(self.part.ranks)
        return width // (max(groups) + 1)

    @property
    def _exchanged(self) -> bool:
        """Whether the wide features change ranks between the linears (structured/cut.py, Cut.many)."""
        cut = wide_factor(self._specs[1]).cut
        return cut is not None and cut.exchanges_features(self.part.ranks)

    @cached_property
    def one_operation(self) -> bool:
        """From bottleneck to bottleneck, as parallel/feed_forward.py decides."""
        if self.structure.dense or self.part.guide or not self.structure.fused_kernels or self._exchanged:
            return False
        blocks, readers = self._blocks
        return self._inner // blocks % readers == 0

    @cached_property
    def _blocks(self) -> tuple[int, int]:
        """Blocks of the first linear's wide factor and of the second's, on this rank; 1 of a matrix."""
        shapes = [wide_factor(specs).local_shape(self.part.ranks) for specs in self._specs]
        first, second = (shape[0] if len(shape) == 3 else 1 for shape in shapes)
        return first, second

    @property
    def kept(self) -> int:
        """Beside the layer's input."""
        if self.structure.dense:
            return self.part.of_tokens(self._wide)
        return self._bottlenecks + (0 if self._narrow else self.part.of_tokens(self._wide))

    @property
    def _narrow(self) -> bool:
        return self.part.config.recompute == "bottleneck" and not self.structure.dense

    @property
    def _wide(self) -> int:
        """Features of the activation's input and output, and of what lies between."""
        if self.part.config.gated and not self.one_operation:
            return 5 * self._inner
        return self._outer + self._inner

    @property
    def _bottlenecks(self) -> int:
        part, (_, _, f, h) = self.part, ffn_linears(self.part.config)[1]
        z_2 = part.own_tokens * self.structure.bottleneck(f, h) * part.element
        wide = part.of_tokens(self._chunk(0))
        return z_2 + (min(self._whole_z_1, wide) if self._narrow else wide)

    # ----------------------------------------------------------------------------------------------- backward

    @property
    def gathered(self) -> int:
        """The gradient of all tokens' output, where backward begins by gathering it."""
        return self.part.gathered if self.structure.dense else 0

    @property
    def output(self) -> int:
        """Of the second linear, of all tokens where their parts are summed at this width."""
        wide = self.structure.dense or self.part.guide
        return self.part.whole_stream if wide else self.part.stream

    @property
    def backward(self) -> int:
        """What the backward pass makes beside what is kept and the gradient of its output."""
        if self.one_operation:
            return self._backward_of_one_operation
        return self._backward_of_what_is_rebuilt if self._narrow else self._backward_by_megatron

    @property
    def _backward_by_megatron(self) -> int:
        """The gradient of the second linear's input T f (where the features are exchanged, twice) and of its
        weights, that of z_2, the stream's of all tokens; or, gated, those of both factors of the product,
        T 2f; or the first linear's gradients, once that of its output has taken the place of T F and T f.
        """
        part, f = self.part, self._inner
        second = part.of_tokens(2 * f if self._exchanged else f) + self._weight(1) + self._second_reads
        gathered = part.gathered if self.part.guide else 0
        first = part.of_tokens(self._outer - self._wide) + self._first_gradients + gathered
        return max(second, part.of_tokens(2 * f * part.config.gated), first)

    @property
    def _first_gradients(self) -> int:
        """Of the first linear's weights, of z_1, of its input T' h and, by a dense matrix, T h."""
        part = self.part
        if self.structure.dense:
            return self._weight(0) + part.whole_stream
        by_guide = part.whole_stream if part.guide and part.ranks > 1 else 0
        return self._weight(0) + self._z_1_gradients + by_guide + part.stream

    @property
    def _backward_of_what_is_rebuilt(self) -> int:
        """``recompute: bottleneck`` with Megatron's code between. To the end stay the first linear's output
        T F, the activation's T f, both their gradients, and the second linear's gradients.

        Beside them, first what else is rebuilt, and gated the gradients of both factors of the product; then
        the first linear's gradients: its weights', z_1's, the input's T' h, by the guide of all tokens.
        """
        part, gated = self.part, self.part.config.gated
        rebuilt = self._wide + (self._outer if part.config.model.bias else 0)
        first = part.of_tokens(rebuilt + self._inner + (2 * self._inner if gated else self._outer))
        whole = part.gathered if part.guide else 0
        then = part.of_tokens(2 * self._outer + 2 * self._inner) + self._first_gradients
        again = part.of_tokens(self._chunk(0)) if part.split_by_tokens else 0
        return max(first, then) + self._weight(1) + self._second_reads + whole + again

    @property
    def _second_reads(self) -> int:
        """Before the second linear's backward products: the gradients of z_2, and of all tokens' output."""
        if self.structure.dense:
            return self.part.gathered
        return self.part.of_tokens(self._chunk(1)) + (self.part.gathered if self.part.guide else 0)

    @property
    def _collected(self) -> int:
        """The gradient of the narrow z_1 where it is not the wide one's memory."""
        groups = wide_factor(self._specs[0]).block_groups(self.part.ranks)
        moved = self.part.split_by_tokens or max(groups) > 0
        return self._whole_z_1 if moved else 0

    @property
    def _z_1_gradients(self) -> int:
        """Of the wide z_1, of the narrow one, and that once more in the order in which blocks wrote it."""
        shuffled = self._blocks[0] > 1
        return self.part.of_tokens(self._chunk(0)) + self._collected + (self._whole_z_1 if shuffled else 0)

    @property
    def _backward_of_one_operation(self) -> int:
        """The gradients of both bottlenecks, and either those of the activation's output and input (which
        shares its memory, unless gated or between blocks) or of the input and of both wide factors; at the
        end those of the factors and of the layer's input.

        With ``recompute: bottleneck`` the wide features are rebuilt, some tokens at a time, and the factors'
        gradients are summed in fp32.
        """
        part, gated = self.part, self.part.config.gated
        factors = self._weight(0, wide=True) + self._weight(1, wide=True)
        z_2 = part.of_tokens(self._chunk(1)) + self._weight(1, wide=False)
        in_place = not gated and 1 in self._blocks
        # between blocks the second linear's factor, or its gradient, is also there in the features' order
        z_2 += self._weight(1, wide=True) if self._blocks[0] > 1 else 0
        made = self._inner
        if not in_place:
            made += self._outer + (self._inner if gated else 0)
        z_1 = part.of_tokens(self._chunk(0)) + self._collected
        end = self._z_1_gradients + factors + self._weight(1, wide=False) + part.stream
        if not self._narrow:
            during = z_1 + z_2 + max(part.of_tokens(made), part.of_tokens(self._outer) + factors)
            return max(during, end)
        again = part.of_tokens(self._chunk(0)) if part.split_by_tokens else 0
        some = min(part.tokens, rebuilt_at_once(part.tokens))
        wide = (self._outer + self._inner + made) * some * part.element
        sums = factors * (4 + part.element) // part.element if some < part.tokens else 0
        return again + max(z_1 + z_2 + wide + sums, end)

    @property
    def _whole_z_1(self) -> int:
        """T' z_1."""
        part, config = self.part, self.part.config
        return (
            part.own_tokens * self.structure.bottleneck(config.model.width, config.ffn_width) * part.element
        )
