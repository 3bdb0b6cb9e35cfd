"""What a config means in numbers: parameters by part and by rank, FLOPs. From the split table; standard library only."""

from __future__ import annotations

import math

from sffn_dist.config import Config
from sffn_dist.shapes import is_guide, model_tensors


def part_of(name: str, config: Config) -> str:
    """The part of the model that a parameter belongs to, as the plan lists them."""
    if is_guide(name):
        return "guide"
    if ".mlp." in name:
        layer = int(name.split(".")[2])
        return "ffn_dense" if config.kind_of_layer(layer) == "dense" else "ffn_structured"
    if "layernorm" in name:
        return "norms"
    return "attention" if ".self_attention." in name else "embedding"


def parameters_by_part(config: Config) -> dict[str, int]:
    """Parameters by part, the guide's under "guide"."""
    parts = dict.fromkeys(("embedding", "attention", "ffn_dense", "ffn_structured", "norms", "guide"), 0)
    for name, spec in model_tensors(config).items():
        parts[part_of(name, config)] += spec.numel
    return parts


def parameters(config: Config) -> int:
    """Parameters of the trained model, without the guide."""
    return sum(count for part, count in parameters_by_part(config).items() if part != "guide")


def _matrix_parameters(config: Config, guide: bool) -> int:
    tensors = model_tensors(config).items()
    return sum(spec.numel for name, spec in tensors if len(spec.shape) > 1 and is_guide(name) == guide)


def _embedding_lookup(config: Config) -> int:
    """Parameters that are only looked up: an untied input embedding takes part in no product."""
    return 0 if config.model.tie_embeddings else config.model.vocab * config.model.width


def flops_per_token(config: Config) -> int:
    """Forward and backward FLOPs a token without the guide (the authors' formula): 6 x matrix parameters + 12 L A S.

    The tied embedding counts once (its product with the hidden state), causal attention is not halved, recomputation does not count.
    """
    attention = 12 * config.model.layers * config.attention_dim * config.model.sequence
    return 6 * (_matrix_parameters(config, guide=False) - _embedding_lookup(config)) + attention


def guide_flops_per_token(config: Config) -> int:
    """Additional FLOPs a token when every guide is computed: 6 x guide parameters."""
    return 6 * _matrix_parameters(config, guide=True)


def parameters_per_rank(config: Config) -> int:
    """Parameters that one tensor-parallel rank holds, guide included, before ZeRO."""
    return sum(math.prod(spec.local_shape(config.parallel.tensor)) for spec in model_tensors(config).values())


def reduce_bucket(config: Config) -> int:
    """Elements that ZeRO reduces at once: DeepSpeed's default, but never a buffer larger than the model."""
    return min(500_000_000, parameters_per_rank(config))
