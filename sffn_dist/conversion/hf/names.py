"""Our tensor names and Hugging Face's: the one place that maps them, in both directions.

A tensor of ours is one tensor there (``whole``), or several, of its rows:

    qkv      linear_qkv, rows grouped by key/value head [its query heads, its key, its value]
             -> q_proj, k_proj, v_proj
    halves   a gated linear_fc1, rows [gate; up] -> gate_proj, up_proj

In the structured format a feed-forward linear is a module of modules, one for each factor
(modeling_sffn.SffnLinear). Exports before that kept factors as bare parameters; they are read by
:data:`SFFN_BARE`.

GPT-NeoX keeps query, key and value in one matrix, grouped by head as ours is where every head has its own
key. Rotary embeddings are the rotate-half form everywhere, so rows keep their order within a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import configured_structure, ffn_linears, ffn_structure
from sffn_dist.structured.structure import Structure

How = Literal["whole", "qkv", "halves"]
HOW: Mapping[int, How] = {1: "whole", 2: "halves", 3: "qkv"}


@dataclass(frozen=True)
class Family:
    """How an architecture calls its modules.

    ``modules`` are a layer's, ours -> theirs; ``outside`` are the others.
    """

    architecture: str  # the class of its causal language model
    layers: str
    modules: Mapping[str, tuple[str, ...]]
    outside: Mapping[str, str]
    unread: tuple[str, ...] = ()  # what a folder may hold beside its parameters: endings of names
    factor_modules: bool = False  # each factor of a feed-forward linear is a module of its own


_OUTSIDE = {
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}
_AROUND = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
}
_ROTARY = (".rotary_emb.inv_freq",)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    layers="model.layers",
    modules=_AROUND
    | {"mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"), "mlp.linear_fc2": ("mlp.down_proj",)},
    outside=_OUTSIDE,
    unread=_ROTARY,
)
STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    layers="model.layers",
    modules=_AROUND | {"mlp.linear_fc1": ("mlp.c_fc",), "mlp.linear_fc2": ("mlp.c_proj",)},
    outside=_OUTSIDE,
    unread=_ROTARY,
)
GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    layers="gpt_neox.layers",
    modules={
        "input_layernorm": ("input_layernorm",),
        "self_attention.linear_qkv": ("attention.query_key_value",),
        "self_attention.linear_proj": ("attention.dense",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
        "mlp.linear_fc1": ("mlp.dense_h_to_4h",),
        "mlp.linear_fc2": ("mlp.dense_4h_to_h",),
    },
    outside={
        "embedding.word_embeddings": "gpt_neox.embed_in",
        "decoder.final_layernorm": "gpt_neox.final_layer_norm",
        "output_layer": "embed_out",
    },
    unread=(*_ROTARY, ".attention.bias", ".attention.masked_bias"),
)
# the structured format: Llama's attention around our feed-forward linears, factors by their own names
SFFN = Family(
    architecture="SffnForCausalLM",
    layers="model.layers",
    modules=_AROUND | {"mlp.linear_fc1": ("mlp.linear_fc1",), "mlp.linear_fc2": ("mlp.linear_fc2",)},
    outside=_OUTSIDE,
    factor_modules=True,
)
SFFN_BARE = dataclasses.replace(SFFN, factor_modules=False)
FAMILIES: Mapping[str, Family] = {  # by config.json's model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "starcoder2": STARCODER2,
    "gpt_neox": GPT_NEOX,
    "sffn": SFFN,
}


def theirs(family: Family, name: str, config: Config) -> tuple[str, ...]:
    """The names there of a tensor of ours, in the order of :func:`split`."""
    module, _, leaf = name.rpartition(".")
    if module in family.outside:
        return (f"{family.outside[module]}.{leaf}",)
    _, _, layer, inner = module.split(".", 3)  # decoder.layers.<layer>.<module>
    leaves: tuple[str, ...] = (leaf,)
    if family.factor_modules and inner.startswith("mlp."):
        leaves = _factor_leaves(config, int(layer), inner, leaf)
    return tuple(
        f"{family.layers}.{layer}.{their_module}.{their_leaf}"
        for their_module in family.modules[inner]
        for their_leaf in leaves
    )


def _factor_leaves(config: Config, layer: int, inner: str, leaf: str) -> tuple[str, ...]:
    """What a factor, guide or bias is called inside its linear's module, in modeling_sffn.py.

    Where every factor is a matrix, the one at the inner features, as a guide there, has its gate apart. The
    bias is the last factor's.
    """
    structure = ffn_structure(config, layer)
    linear = inner.removeprefix("mlp.")
    role, inputs, outputs = next((r, i, o) for name, r, i, o in ffn_linears(config) if name == linear)
    owner, parameter = leaf, "weight"
    if leaf == "bias":
        owner, parameter = structure.factors[-1], "bias"
    module = "dense" if structure.dense and owner in structure.factors else owner
    at_inner = structure.factors[-1 if role == "column" else 0]
    if not _matrices(structure, inputs, outputs) or owner not in (at_inner, "guide"):
        return (f"{module}.{parameter}",)
    if role == "row":
        return (f"{module}.down_proj.{parameter}",)
    parts = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
    return tuple(f"{module}.{part}.{parameter}" for part in parts)


def _matrices(structure: Structure, inputs: int, outputs: int) -> bool:
    return all(len(shape) == 2 for shape in structure.factor_shapes(inputs, outputs).values())


def cut_over_ranks(config: Config) -> bool:
    """Whether modeling_sffn's tensor-parallel plan cuts the structured feed-forward layers: those whose
    factors are matrices. Blocks are whole on every rank.
    """
    structure = configured_structure(config, config.ffn.kind)
    return all(_matrices(structure, inputs, outputs) for _, _, inputs, outputs in ffn_linears(config))


def bare_factors(names: Iterable[str]) -> bool:
    """Whether these tensors of a structured folder are named by :data:`SFFN_BARE`: a factor right below its
    linear.
    """
    return any(name.partition(".mlp.linear_fc")[2].count(".") == 1 for name in names)


def _rows(how: How, rows: int, config: Config) -> tuple[int, ...]:
    """How many of our rows each of their tensors has."""
    if how == "qkv":
        keys = config.kv_heads * config.head_dim
        return config.attention_dim, keys, keys
    return (rows // 2, rows // 2) if how == "halves" else (rows,)


def shapes(family: Family, name: str, shape: tuple[int, ...], config: Config) -> dict[str, tuple[int, ...]]:
    """Their names and shapes of a tensor of ours with its ``shape``."""
    names = theirs(family, name, config)
    rows = _rows(HOW[len(names)], shape[0], config)
    return {their_name: (count, *shape[1:]) for their_name, count in zip(names, rows, strict=True)}


def split(family: Family, name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Their (name, tensor) of a tensor of ours, one made at a time."""
    names = theirs(family, name, config)
    if HOW[len(names)] != "qkv":
        yield from zip(names, tensor.chunk(len(names)), strict=True)
        return
    heads = config.model.heads // config.kv_heads
    grouped = tensor.unflatten(0, (config.kv_heads, heads + 2, config.head_dim))
    for their_name, part in zip(names, grouped.split((heads, 1, 1), dim=1), strict=True):
        yield their_name, part.reshape(-1, *tensor.shape[1:])


def join(parts: Sequence[Tensor], config: Config) -> Tensor:
    """The inverse of :func:`split`: a tensor of ours from theirs, in the order of :func:`theirs`."""
    if HOW[len(parts)] != "qkv":
        return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]
    grouped = [part.unflatten(0, (config.kv_heads, -1, config.head_dim)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 2)
