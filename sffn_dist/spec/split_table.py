"""The split table: what tensors a config means, and how each is cut over ranks. Standard library only.

The split table (:func:`linear_tensors`, :func:`model_tensors`) is the one declaration of every tensor's full shape and of how it is
cut over p tensor-parallel ranks. Constructors, initialisation, checkpoints, the plan and the tests read it.

A cut names axes of a *view* of the full tensor. BlockShuffle shows why: its output feature s*B + l belongs to block l, so a cut over
blocks is contiguous in the factor (B, M/B, n/B) and strided in the activation, the bias and the guide. With the inner features seen as
(k, s', l) = (B, f/B^2, B), one layout serves them all: cut l first, then (more ranks than blocks) k, then s'.

Shapes: h width, f inner width, R rank, B blocks, p tensor-parallel ranks; matrices are (outputs, inputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sffn_dist.spec.config import Config, FFNKind

Role = Literal["column", "row"]


@dataclass(frozen=True)
class Cut:
    """Split ``view`` (which refines a tensor's shape) along ``axes``: each in turn takes as many ways as divide it.

    ``many`` names one axis that is cut instead, into p parts, where it can be and p is at least ``many_from``.
    """

    view: tuple[int, ...]
    axes: tuple[int, ...]
    many: int | None = None
    many_from: int = 0

    def exchanges_features(self, p: int) -> bool:
        """Whether p ranks cut axis ``many``."""
        return self.many is not None and p >= max(2, self.many_from) and self.view[self.many] % p == 0

    def ways(self, p: int) -> tuple[tuple[int, int], ...]:
        """(axis, ways) pairs whose ways multiply to p; raises ValueError if p does not fit."""
        left, pairs = p, []
        for axis in (self.many,) if self.exchanges_features(p) and self.many is not None else self.axes:
            ways = math.gcd(self.view[axis], left)
            left //= ways
            pairs.append((axis, ways))
        if left != 1:
            raise ValueError(f"{p} tensor-parallel ranks do not divide axes {self.axes} of {self.view}")
        return tuple(pairs)

    def local_view(self, p: int) -> tuple[int, ...]:
        """The view's sizes on one of p ranks; raises ValueError if p does not fit."""
        view = list(self.view)
        for axis, ways in self.ways(p):
            view[axis] //= ways
        return tuple(view)

    def starts(self, p: int, rank: int) -> tuple[tuple[int, int, int], ...]:
        """(axis, start, length) of ``rank``'s part; the first axis is the slowest digit of the rank."""
        if not 0 <= rank < p:
            raise ValueError(f"rank {rank} of {p}")
        parts, below = [], p
        for axis, ways in self.ways(p):
            below //= ways
            length = self.view[axis] // ways
            parts.append((axis, rank // below % ways * length, length))
        return tuple(parts)


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor: its full shape and its cut (None: every tensor-parallel rank holds all of it)."""

    shape: tuple[int, ...]
    cut: Cut | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def _dim_of_axes(self) -> tuple[int, ...]:
        """For each axis of the cut's view, the dimension of ``shape`` that it belongs to."""
        assert self.cut is not None
        owners, dim, covered = [], 0, 1
        for size in self.cut.view:
            while covered * size > self.shape[dim]:
                dim, covered = dim + 1, 1
            covered *= size
            owners.append(dim)
        return tuple(owners)

    def local_shape(self, p: int) -> tuple[int, ...]:
        """The shape that one of p ranks holds; raises ValueError if p does not fit."""
        if self.cut is None or p == 1:
            return self.shape
        sizes = [1] * len(self.shape)
        for owner, size in zip(self._dim_of_axes(), self.cut.local_view(p), strict=True):
            sizes[owner] *= size
        return tuple(sizes)

    def partition_dim(self, p: int) -> int:
        """The dimension cut first (Megatron's ``partition_dim``); -1 if replicated."""
        if self.cut is None or not self.cut.axes:
            return -1
        owners = self._dim_of_axes()
        return next((owners[axis] for axis, ways in self.cut.ways(p) if ways > 1), owners[self.cut.axes[0]])

    def block_groups(self, p: int) -> tuple[int, ...]:
        """For each of p ranks, which group of blocks of a block factor (blocks, outputs, inputs) it holds; all 0 for a matrix."""
        if self.cut is None or len(self.shape) < 3 or p == 1:
            return (0,) * p
        parts = [{axis: (start, length) for axis, start, length in self.cut.starts(p, rank)} for rank in range(p)]
        return tuple(part[0][0] // part[0][1] if 0 in part else 0 for part in parts)


@dataclass(frozen=True)
class Layout:
    """How the inner features f lie over ranks: the layout a first linear writes and a second one reads."""

    view: tuple[int, ...]
    axes: tuple[int, ...]

    def within(self, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Cut:
        return Cut((*before, *self.view, *after), tuple(axis + len(before) for axis in self.axes))


def inner_layout(kind: FFNKind, features: int, blocks: int | None) -> Layout:
    """Layout of the f inner features of a feed-forward layer of this kind."""
    if kind == "block_dense" and blocks:
        return Layout((blocks, features // blocks), (0, 1))  # blocks first, then inside a block
    if kind == "block_shuffle" and blocks:
        if features % blocks**2:
            return Layout((features // blocks, blocks), ())  # cannot be cut: one rank only
        return Layout((blocks, features // blocks**2, blocks), (2, 0, 1))
    return Layout((features,), (0,))


@dataclass(frozen=True)
class Structure:
    """Which structure a linear has: ``rank`` for low_rank and block_dense, ``blocks`` for the two block kinds."""

    kind: FFNKind
    rank: int | None = None
    blocks: int | None = None

    @property
    def needed_rank(self) -> int:
        assert self.rank is not None, f"{self.kind} needs a rank"
        return self.rank

    @property
    def needed_blocks(self) -> int:
        assert self.blocks is not None, f"{self.kind} needs blocks"
        return self.blocks

    def bottleneck(self, inputs: int, outputs: int) -> int:
        """Width of z between the two factors."""
        return min(inputs, outputs) if self.kind == "block_shuffle" else self.needed_rank

    def factor_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Full shapes of the factors of an (outputs, inputs) matrix, first-applied first."""
        m, n = outputs, inputs
        if self.kind == "dense":
            return {"weight": (m, n)}
        if self.kind == "low_rank":
            return {"down": (self.needed_rank, n), "up": (m, self.needed_rank)}
        b = self.needed_blocks
        if self.kind == "block_dense":
            return {"block_in": (b, self.needed_rank // b, n // b), "up": (m, self.needed_rank)}
        return {"block_in": (b, min(n, m) // b, n // b), "block_out": (b, m // b, min(n, m) // b)}


def linear_tensors(
    structure: Structure, role: Role, inputs: int, outputs: int, *, gated: bool = False, bias: bool = False, guide: bool = False
) -> dict[str, TensorSpec]:
    """The split table of one linear of a feed-forward layer.

    ``role`` "column" is the first linear (h -> f, or 2f when ``gated``), "row" the second (f -> h). Factors come first-applied first;
    then ``guide`` (outputs, inputs) and ``bias`` (outputs,).
    """
    column = role == "column"
    gate = (2,) if column and gated else ()
    halves = 2 if gate else 1
    features = outputs // halves if column else inputs
    layout = inner_layout(structure.kind, features, structure.blocks)
    shapes = structure.factor_shapes(inputs, outputs)
    wide: tuple[str, Cut]  # the factor that touches the f axis
    kind = structure.kind
    if kind == "dense":
        wide = "weight", layout.within(gate, (inputs,)) if column else layout.within((outputs,))
    elif column:
        if kind == "block_shuffle":
            wide = "block_out", _shuffled_out(layout, gate, shapes["block_out"][2])
        else:
            wide = "up", layout.within(gate, (structure.needed_rank,))
    elif kind == "low_rank":
        wide = "down", layout.within((structure.needed_rank,))
    else:
        wide = "block_in", _block_in(layout, structure, shapes["block_in"])
    tensors = {name: TensorSpec(shape, wide[1] if name == wide[0] else None) for name, shape in shapes.items()}
    if guide and kind != "dense":
        cut = layout.within(gate, (inputs,)) if column else layout.within((outputs,))
        tensors["guide"] = TensorSpec((outputs, inputs), cut)
    if bias:
        tensors["bias"] = TensorSpec((outputs,), layout.within(gate) if column else None)
    return tensors


def wide_factor(specs: dict[str, TensorSpec]) -> TensorSpec:
    """Of a structured linear's tensors, the factor that touches the f axis: the cut one. Its groups of blocks are z's chunks."""
    return next(spec for name, spec in specs.items() if name not in ("guide", "bias") and spec.cut is not None)


def _shuffled_out(layout: Layout, gate: tuple[int, ...], reduced: int) -> Cut:
    """block_out (B, M/B, n/B) of a first linear: rows (gate, k, s') of block l; features lie as (gate, k, s', l)."""
    if len(layout.view) == 2:  # not cuttable
        return Cut((layout.view[1], *gate, layout.view[0], reduced), ())
    k, s, blocks = layout.view
    g = len(gate)
    return Cut((blocks, *gate, k, s, reduced), (0, 1 + g, 2 + g))


def _block_in(layout: Layout, structure: Structure, shape: tuple[int, ...]) -> Cut:
    """block_in (B, n/B, f/B) of a second linear: block k reads features (k, s', l), or (k, i) for block_dense."""
    blocks, rows, _ = shape
    if structure.kind == "block_dense":
        return Cut((blocks, rows, layout.view[1]), (0, 2))
    if len(layout.view) == 2:
        return Cut(shape, ())
    # Two routes to z, h wide; elements received a token and rank, x (p-1)/p. With the features as they lie every rank has a part of all
    # of z (of h/q where the blocks k are cut q ways): to sum, h/q. Or the wide features are exchanged for whole blocks k first, f/p, and
    # every rank has its h/p of z complete: f/p + h/p, which is less where f + h < p h and p divides the blocks (then q = 1).
    width, inner = blocks * rows, math.prod(layout.view)
    return Cut((blocks, rows, layout.view[1], layout.view[2]), (3, 0, 2), many=0, many_from=inner // width + 2)


# ---------------------------------------------------------------------------------------------------------- the whole model


def ffn_structure(config: Config, layer: int) -> Structure:
    """The structure of a layer's two feed-forward linears."""
    kind = config.kind_of_layer(layer)
    if kind == "dense":
        return Structure("dense")
    return Structure(
        kind,
        rank=config.ffn.rank if kind in ("low_rank", "block_dense") else None,
        blocks=config.ffn.blocks if kind in ("block_shuffle", "block_dense") else None,
    )


def ffn_linears(config: Config) -> tuple[tuple[str, Role, int, int], ...]:
    """(name, role, inputs, outputs) of a feed-forward layer's two linears; the first one's outputs are 2f if gated."""
    h, f = config.model.width, config.ffn_width
    return ("linear_fc1", "column", h, 2 * f if config.gated else f), ("linear_fc2", "row", f, h)


def layer_tensors(config: Config, layer: int, *, guide: bool) -> dict[str, TensorSpec]:
    """Tensors of one transformer layer by their names inside it (megatron-core's names), with its guides or without."""
    model, h = config.model, config.model.width
    qkv = config.attention_dim + 2 * config.kv_heads * config.head_dim
    norm = _norm(config)
    tensors: dict[str, TensorSpec] = {f"input_layernorm.{k}": v for k, v in norm.items()}
    # rows of linear_qkv come grouped by key/value head: its query heads, its key, its value
    tensors["self_attention.linear_qkv.weight"] = TensorSpec((qkv, h), Cut((qkv, h), (0,)))
    tensors["self_attention.linear_proj.weight"] = TensorSpec((h, config.attention_dim), Cut((h, config.attention_dim), (1,)))
    if model.bias:
        tensors["self_attention.linear_qkv.bias"] = TensorSpec((qkv,), Cut((qkv,), (0,)))
        tensors["self_attention.linear_proj.bias"] = TensorSpec((h,))
    tensors.update({f"pre_mlp_layernorm.{k}": v for k, v in norm.items()})
    structure = ffn_structure(config, layer)
    for linear, role, inputs, outputs in ffn_linears(config):
        specs = linear_tensors(structure, role, inputs, outputs, gated=config.gated, bias=model.bias, guide=guide)
        tensors.update({f"mlp.{linear}.{name}": spec for name, spec in specs.items()})
    return tensors


def _norm(config: Config) -> dict[str, TensorSpec]:
    names = ("weight", "bias") if config.model.norm == "layernorm" else ("weight",)
    return {name: TensorSpec((config.model.width,)) for name in names}


def model_tensors(config: Config, *, guide: bool) -> dict[str, TensorSpec]:
    """Every parameter of the model: name in the GPTModel -> spec. A tied output layer is not listed.

    ``guide``: with a guide for every structured linear, as in the guided phase, or with none, as in the others.
    """
    table = (config.model.vocab, config.model.width)
    tensors = {"embedding.word_embeddings.weight": TensorSpec(table, Cut(table, (0,)))}
    for layer in range(config.model.layers):
        tensors.update(
            {f"decoder.layers.{layer}.{name}": spec for name, spec in layer_tensors(config, layer, guide=guide).items()}
        )
    tensors.update({f"decoder.final_layernorm.{name}": spec for name, spec in _norm(config).items()})
    if not config.model.tie_embeddings:
        tensors["output_layer.weight"] = TensorSpec(table, Cut(table, (0,)))
    return tensors


def is_guide(name: str) -> bool:
    return name.endswith(".guide")
