"""What a config means in numbers: parameters by part and by rank, FLOPs.

From the split table; standard library only.
"""

from __future__ import annotations

import math

from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import ffn_linears, ffn_structure, is_guide, model_tensors
from sffn_dist.structured.registry import DENSE


def part_of(name: str, config: Config) -> str:
    """The part of the model that a parameter belongs to, as the plan lists them."""
    if ".mlp." in name:
        layer = int(name.split(".")[2])
        return "ffn_dense" if ffn_structure(config, layer).dense else "ffn_structured"
    if "layernorm" in name:
        return "norms"
    return "attention" if ".self_attention." in name else "embedding"


def parameters_by_part(config: Config) -> dict[str, int]:
    """Parameters of the trained model by part, without the guide."""
    parts = dict.fromkeys(("embedding", "attention", "ffn_dense", "ffn_structured", "norms"), 0)
    for name, spec in model_tensors(config, guide=False).items():
        parts[part_of(name, config)] += spec.numel
    return parts


def parameters(config: Config) -> int:
    """Parameters of the trained model, without the guide."""
    return sum(parameters_by_part(config).values())


def guide_parameters(config: Config) -> int:
    """Parameters that a guide adds while it lasts: the dense matrices of the structured linears."""
    return sum(spec.numel for name, spec in model_tensors(config, guide=True).items() if is_guide(name))


def all_dense(config: Config) -> Config:
    """The same model with dense feed-forward layers."""
    recompute = "none" if config.recompute == "bottleneck" else config.recompute
    return config.model_copy(
        update={"ffn": config.ffn.model_copy(update={"kind": DENSE}), "recompute": recompute}
    )


def _multiplications(config: Config) -> int:
    """Multiplications a token in one forward pass by all matrices: one for each parameter, but where a
    structure says otherwise.
    """
    matrices = {
        name: spec for name, spec in model_tensors(config, guide=False).items() if len(spec.shape) > 1
    }
    others = sum(spec.numel for name, spec in matrices.items() if ".mlp." not in name)
    structures = [ffn_structure(config, layer) for layer in range(config.model.layers)]
    linears = [(inputs, outputs) for _, _, inputs, outputs in ffn_linears(config)]
    return others + sum(structure.multiplications(*sizes) for structure in structures for sizes in linears)


def _embedding_lookup(config: Config) -> int:
    """Parameters that are only looked up: an untied input embedding takes part in no product."""
    return 0 if config.model.tie_embeddings else config.model.vocab * config.model.width


def flops_per_token(config: Config) -> int:
    """Forward and backward FLOPs a token without the guide (the authors' formula): 6 x multiplications by
    matrices + 12 L A S.

    The tied embedding counts once (its product with the hidden state), causal attention is not halved,
    recomputation does not count.
    """
    attention = 12 * config.model.layers * config.attention_dim * config.model.sequence
    return 6 * (_multiplications(config) - _embedding_lookup(config)) + attention


def guide_flops_per_token(config: Config) -> int:
    """Additional FLOPs a token when every guide is computed: 6 x guide parameters."""
    return 6 * guide_parameters(config)


def parameters_per_rank(config: Config, *, guide: bool) -> int:
    """Parameters that one tensor-parallel rank holds, with the guide or without, before ZeRO."""
    tensors = model_tensors(config, guide=guide).values()
    return sum(math.prod(spec.local_shape(config.parallel.tensor)) for spec in tensors)


def largest_parameter_per_rank(config: Config, *, guide: bool) -> int:
    """Elements of the largest parameter that one tensor-parallel rank holds."""
    tensors = model_tensors(config, guide=guide).values()
    return max(math.prod(spec.local_shape(config.parallel.tensor)) for spec in tensors)


def reduce_bucket(config: Config, *, guide: bool) -> int:
    """Elements that ZeRO reduces at once, but never a buffer larger than the model.

    A tenth of DeepSpeed's default, which holds the whole model: then nothing travels before the backward pass
    has ended.
    """
    return min(50_000_000, parameters_per_rank(config, guide=guide))
