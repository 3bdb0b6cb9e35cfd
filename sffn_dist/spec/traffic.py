"""What a step sends over the tensor-parallel group, from the split table alone; and over the data-parallel
group, by ZeRO. Standard library only.

Counted are elements *received* by one rank, exactly, p ranks, a tensor of n elements:

    all_gather (n gathered), reduce_scatter (n given), all_to_all (n given)   n (p-1)/p
    all_reduce                                                               2n (p-1)/p

A bottleneck z of r features in ``count`` chunks (TensorSpec.block_groups) is spread or collected as
parallel/collectives.py says. With sequence parallelism, T tokens: spread and collect are T r / count;
without: spread is nothing, collect an all-gather of T r if there are as many chunks as ranks, an all-reduce
of it if there is one, else an all-to-all of T r / count and then an all-gather of T r. parallel/ledger.py
counts what is really sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from sffn_dist.spec.config import Config
from sffn_dist.spec.counts import parameters_per_rank
from sffn_dist.spec.split_table import (
    ffn_linears,
    ffn_structure,
    layer_tensors,
    linear_tensors,
    model_tensors,
    wide_factor,
)
from sffn_dist.structured.cut import Role, TensorSpec
from sffn_dist.structured.structure import Structure


@dataclass(frozen=True)
class Transfer:
    """Elements that a rank receives in one micro-batch, or in a step.

    ``purpose``: forward, backward, gradient (of what every rank of the group holds; training sums it once a
    step, see :func:`step_traffic`), or weights (:func:`zero_traffic`).
    """

    purpose: str
    kind: str
    elements: Fraction
    place: str = ""
    size: int | None = None  # bytes of an element, where it is not the activations'


@dataclass(frozen=True)
class TrafficGroup:
    """A tensor-parallel group of ``ranks`` and what it shares: ``tokens`` of a micro-batch, split among it
    with ``sequence``.
    """

    ranks: int
    tokens: int
    sequence: bool

    def moved(self, purpose: str, kind: str, elements: int) -> Iterator[Transfer]:
        """Nothing, in a group of one."""
        if self.ranks > 1:
            yield Transfer(
                purpose,
                kind,
                Fraction((2 if kind == "all_reduce" else 1) * elements * (self.ranks - 1), self.ranks),
            )

    def spread(self, purpose: str, width: int, count: int = 1) -> Iterator[Transfer]:
        """``width`` features of the rank's tokens -> its chunk of all tokens."""
        if self.sequence:
            kind = "all_gather" if count == 1 else "all_to_all"
            yield from self.moved(purpose, kind, self.tokens * width // count)

    def collect(self, purpose: str, width: int, count: int = 1) -> Iterator[Transfer]:
        """The rank's chunk of all tokens -> all features of the rank's tokens."""
        if self.sequence:
            kind = "reduce_scatter" if count == 1 else "all_to_all"
            yield from self.moved(purpose, kind, self.tokens * width // count)
        else:
            elements = self.tokens * width
            if 1 < count < self.ranks and elements // count % self.ranks == 0:
                yield from self.moved(purpose, "all_to_all", elements // count)
                yield from self.moved(purpose, "all_gather", elements)
            else:
                yield from self.moved(
                    purpose, "all_gather" if 1 < count == self.ranks else "all_reduce", elements
                )

    def sum_gradient(self, spec: TensorSpec) -> Iterator[Transfer]:
        """The gradient of a tensor that every rank holds and computes from its own tokens."""
        if self.sequence and spec.cut is None:
            yield from self.moved("gradient", "all_reduce", spec.numel)


def dense_linear(group: TrafficGroup, role: Role, inputs: int, outputs: int) -> Iterator[Transfer]:
    """Megatron's column-parallel (inputs -> outputs) or row-parallel linear, without its bias."""
    if role == "column":
        yield from group.spread("forward", inputs)
        yield from group.spread("backward", inputs)  # again, for the weight's gradient
        yield from group.collect("backward", inputs)
    else:
        yield from group.collect("forward", outputs)
        yield from group.spread("backward", outputs)


def structured_linear(
    group: TrafficGroup,
    structure: Structure,
    role: Role,
    inputs: int,
    outputs: int,
    specs: dict[str, TensorSpec],
    narrow: bool = False,
) -> Iterator[Transfer]:
    """One linear without its guide and bias.

    ``narrow``: with ``recompute: bottleneck``, which moves some of it once more.
    """
    wide = wide_factor(specs)
    count = max(wide.block_groups(group.ranks)) + 1
    width = structure.bottleneck(inputs, outputs)
    if role == "column":
        yield from group.spread("forward", width, count)
        yield from group.collect("backward", width, count)
        if narrow and count < group.ranks:
            yield from group.spread("backward", width, count)
    else:
        turns = 1 if wide.cut is not None and wide.cut.exchanges_features(group.ranks) else 0
        yield from _times(turns, group.moved("forward", "all_to_all", group.tokens * inputs // group.ranks))
        yield from group.collect("forward", width, count)
        yield from group.spread("backward", width, count)
        yield from _times(
            turns * (1 + narrow), group.moved("backward", "all_to_all", group.tokens * inputs // group.ranks)
        )
    for name, spec in specs.items():
        if name not in ("guide", "bias"):  # of the factors, the one that every rank holds
            yield from group.sum_gradient(spec)


def _times(times: int, moved: Iterable[Transfer]) -> Iterator[Transfer]:
    return (replace(transfer, elements=transfer.elements * times) for transfer in moved if times)


def feed_forward(
    group: TrafficGroup, structure: Structure, h: int, f: int, *, gated: bool = False, narrow: bool = False
) -> list[Transfer]:
    """Both linears of a feed-forward layer h -> f -> h without biases; ``structure`` may be dense."""
    if structure.dense:
        return [*dense_linear(group, "column", h, f), *dense_linear(group, "row", f, h)]
    wide = 2 * f if gated else f
    first = linear_tensors(structure, "column", h, wide, gated=gated)
    second = linear_tensors(structure, "row", f, h)
    return [
        *structured_linear(group, structure, "column", h, wide, first, narrow),
        *structured_linear(group, structure, "row", f, h, second, narrow),
    ]


def total(moved: Iterable[Transfer], purpose: str | None = None) -> Fraction:
    """Elements, of one purpose or of all."""
    return sum((transfer.elements for transfer in moved if purpose in (None, transfer.purpose)), Fraction(0))


# -------------------------------------------------------------------------------------------- the whole model


def group_of(config: Config) -> TrafficGroup:
    """The run's tensor-parallel group and one micro-batch."""
    tokens = config.micro_batch_size * config.model.sequence
    return TrafficGroup(
        config.parallel.tensor, tokens, config.parallel.sequence and config.parallel.tensor > 1
    )


def layer_traffic(config: Config, layer: int, *, guide: bool = False) -> list[Transfer]:
    """A transformer layer's, by place in it; with ``guide`` what its guides add where they are drawn."""
    group, h = group_of(config), config.model.width
    structure, specs = ffn_structure(config, layer), layer_tensors(config, layer, guide=guide)
    moved: list[Transfer] = []

    def add(place: str, transfers: Iterable[Transfer]) -> None:
        moved.extend(replace(transfer, place=place) for transfer in transfers)

    for linear, role, inputs, outputs in ffn_linears(config):
        name = f"mlp.{linear}"
        if guide:  # split as a dense linear is
            add(name, dense_linear(group, role, inputs, outputs) if f"{name}.guide" in specs else ())
        elif structure.dense:
            add(name, dense_linear(group, role, inputs, outputs))
        else:
            own = {key.rpartition(".")[2]: spec for key, spec in specs.items() if key.startswith(f"{name}.")}
            add(
                name,
                structured_linear(
                    group, structure, role, inputs, outputs, own, config.recompute == "bottleneck"
                ),
            )
    if not guide:
        add("self_attention.linear_qkv", dense_linear(group, "column", h, h))
        if config.gathers_qkv:
            rows = group.tokens * specs["self_attention.linear_qkv.weight"].shape[0]
            add("self_attention", group.moved("forward", "all_gather", rows))
            add("self_attention", group.moved("backward", "reduce_scatter", rows))
        add("self_attention.linear_proj", dense_linear(group, "row", h, h))
    # forward again, up to the last tensor that backward reads: a dense layer's last sum is not
    if config.recompute == "full":
        moved += [
            replace(transfer, purpose="backward")
            for transfer in moved
            if transfer.purpose == "forward" and not (structure.dense and transfer.place == "mlp.linear_fc2")
        ]
    for name, spec in specs.items():
        if len(spec.shape) == 1 and not guide:  # norms, and biases of row-parallel linears
            add(name, group.sum_gradient(spec))
    return moved


def model_traffic(config: Config) -> list[Transfer]:
    """One micro-batch's of the whole model without guides: embedding, layers, output layer, loss."""
    group, h = group_of(config), config.model.width
    moved: list[Transfer] = []

    def add(place: str, transfers: Iterable[Transfer]) -> None:
        moved.extend(
            replace(transfer, place=f"{place}.{transfer.place}" if transfer.place else place)
            for transfer in transfers
        )

    # rows of the vocabulary are cut: partial sums
    add("embedding.word_embeddings", dense_linear(group, "row", h, h))
    for layer in range(config.model.layers):
        add(f"decoder.layers.{layer}", layer_traffic(config, layer))
    for name, spec in model_tensors(config, guide=False).items():
        if name.startswith("decoder.final_layernorm."):
            add(name, group.sum_gradient(spec))
    add("output_layer", dense_linear(group, "column", h, h))
    # the vocabulary-parallel loss: each token's largest logit, its label's, and the sum of exponentials, in
    # fp32
    for _ in range(3):
        moved.extend(
            replace(transfer, size=4) for transfer in group.moved("forward", "all_reduce", group.tokens)
        )
    return moved


def step_traffic(config: Config, data_parallel: int) -> list[Transfer]:
    """A step's: every micro-batch's, but the gradients of what every rank holds once, after the last one.

    Those are summed in fp32 where ZeRO keeps them (training/partial_sums.py); in stages 2 and 3 of the rank's
    own fragments alone, here a mean over the data-parallel ranks.
    """
    steps, stage = config.accumulation_steps(data_parallel), config.zero.stage
    return [
        replace(
            transfer,
            elements=transfer.elements / (data_parallel if stage >= 2 else 1),
            size=4,
        )
        if transfer.purpose == "gradient"
        else replace(transfer, elements=transfer.elements * steps)
        for transfer in model_traffic(config)
    ]


def zero_traffic(config: Config, precision: str, data_parallel: int, *, guide: bool) -> list[Transfer]:
    """A step's over the data-parallel group, of a rank's n parameters, as DeepSpeed 0.19 makes it.

    Gradients, in ``zero.reduce_dtype`` if training is in bf16: stages 0 and 1 all-reduce their sums over
    micro-steps once; stage 2 all-reduces, and stage 3 reduce-scatters, those of every micro-step. Weights:
    stages 1 and 2 gather them once, after the update; stage 3 in every micro-step, here once, as long as a
    rank computes with fewer than 10^9 (with more, DeepSpeed frees them after the forward pass and gathers
    them again).
    """
    stage, steps = config.zero.stage, config.accumulation_steps(data_parallel)
    low = 2 if precision == "bf16" else 4
    reduced = 4 if config.zero.reduces_in(precision) == "fp32" else 2
    n, group = parameters_per_rank(config, guide=guide), TrafficGroup(data_parallel, 0, False)
    sums = group.moved("gradient", "reduce_scatter" if stage == 3 else "all_reduce", n)
    weights = group.moved("weights", "all_gather", n) if stage else ()
    return [
        *(replace(moved, size=reduced) for moved in _times(steps if stage >= 2 else 1, sums)),
        *(replace(moved, size=low) for moved in _times(steps if stage == 3 else 1, weights)),
    ]
