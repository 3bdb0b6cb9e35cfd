"""Our tensor names and Hugging Face's: the one place that maps them, in both directions.

A tensor of ours is one tensor there (``whole``), or several, of its rows:

    qkv      linear_qkv, rows grouped by key/value head [its query heads, its key, its value]
             -> q_proj, k_proj, v_proj
    halves   a gated linear_fc1, rows [gate; up] -> gate_proj, up_proj

GPT-NeoX keeps query, key and value in one matrix, grouped by head as ours is where every head has its own
key. Rotary embeddings are the rotate-half form everywhere, so rows keep their order within a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sffn_dist.spec.config import Config

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
)
FAMILIES: Mapping[str, Family] = {  # by config.json's model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "starcoder2": STARCODER2,
    "gpt_neox": GPT_NEOX,
    "sffn": SFFN,
}


def theirs(family: Family, name: str) -> tuple[str, ...]:
    """The names there of a tensor of ours, in the order of :func:`split`."""
    module, _, leaf = name.rpartition(".")
    if module in family.outside:
        return (f"{family.outside[module]}.{leaf}",)
    _, _, layer, inner = module.split(".", 3)  # decoder.layers.<layer>.<module>
    return tuple(f"{family.layers}.{layer}.{their_module}.{leaf}" for their_module in family.modules[inner])


def _rows(how: How, rows: int, config: Config) -> tuple[int, ...]:
    """How many of our rows each of their tensors has."""
    if how == "qkv":
        keys = config.kv_heads * config.head_dim
        return config.attention_dim, keys, keys
    return (rows // 2, rows // 2) if how == "halves" else (rows,)


def shapes(family: Family, name: str, shape: tuple[int, ...], config: Config) -> dict[str, tuple[int, ...]]:
    """Their names and shapes of a tensor of ours with its ``shape``."""
    names = theirs(family, name)
    rows = _rows(HOW[len(names)], shape[0], config)
    return {their_name: (count, *shape[1:]) for their_name, count in zip(names, rows, strict=True)}


def split(family: Family, name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Their (name, tensor) of a tensor of ours, one made at a time."""
    names = theirs(family, name)
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
