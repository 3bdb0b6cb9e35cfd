"""Estimated memory of a rank, for the plan. Standard library only."""

from __future__ import annotations

from sffn_dist.spec.config import Config
from sffn_dist.spec.counts import parameters_per_rank, reduce_bucket
from sffn_dist.spec.split_table import ffn_linears, ffn_structure, linear_tensors, wide_factor


def memory_per_rank(config: Config, precision: str, data_parallel: int, *, guide: bool) -> dict[str, int]:
    """Estimated bytes a rank: weights, gradients, fp32 master weights and Adam moments under the ZeRO stage,
    activations.

    ``guide``: while the guide lasts, or without one.
    """
    n, stage, low = (
        parameters_per_rank(config, guide=guide),
        config.zero.stage,
        2 if precision == "bf16" else 4,
    )
    share = [data_parallel if stage >= level else 1 for level in (3, 2, 1)]
    # DeepSpeed keeps fp32 master weights apart from the weights in ZeRO 1-3, and always under bf16
    master = 4 if precision == "bf16" or stage else 0
    accumulated = 4 if precision == "bf16" and stage else 0  # gradients are summed over micro-steps in fp32
    memory = {
        "weights": n * low // share[0],
        "gradients": n * (low + accumulated) // share[1],
        "optimizer": n * (8 + master) // share[2],
        # two buckets, so that one fills while the other is reduced
        "buffers": 2 * reduce_bucket(config, guide=guide) * low if stage else 0,
        "activations": activation_bytes(config, low, guide=guide),
    }
    return {**memory, "total": sum(memory.values())}


def activation_bytes(config: Config, element: int, *, guide: bool = False) -> int:
    """Estimated bytes of activations kept for backward by one micro-batch, the logits' fp32 copies
    included.
    """
    p = config.parallel.tensor
    tokens = config.train.micro_batch_size * config.model.sequence
    shared = p if config.parallel.sequence else 1
    h, layers = config.model.width, config.model.layers
    logits = 3 * 4 * tokens * config.model.vocab // p  # logits in fp32, their exponentials, their gradient
    stream = 2 * h * element * tokens // shared  # a layer's input and its residual sum
    kept = [
        _layer_elements(config, layer, config.recompute == "bottleneck", guide) for layer in range(layers)
    ]
    whole = [_layer_elements(config, layer, False, guide) for layer in range(layers)]
    if config.recompute == "full":
        return logits + layers * stream // 2 + max(whole) * tokens * element
    rebuilt = max(total - stored for total, stored in zip(whole, kept, strict=True))  # one layer's at a time
    at_once = tokens if guide else min(tokens, rebuilt_at_once(tokens))
    return logits + layers * stream + (sum(kept) * tokens + rebuilt * at_once) * element


def rebuilt_at_once(tokens: int) -> int:
    """Tokens whose wide features ``recompute: bottleneck`` holds at a time while no guide takes part:
    sffn_kernels.bottleneck.at_a_time.
    """
    return max(1024, -(-tokens // 24))


def _layer_elements(config: Config, layer: int, narrow: bool, guide: bool) -> int:
    """Elements a token that a layer keeps beside the residual stream: norms' outputs, q k v, attention,
    the feed-forward layer's.
    """
    p, h = config.parallel.tensor, config.model.width
    qkv = config.attention_dim + 2 * config.kv_heads * config.head_dim
    attention = config.attention_dim // p + (qkv if config.gathers_qkv else qkv // p)
    return (
        2 * h // (p if config.parallel.sequence else 1)
        + attention
        + feed_forward_elements(config, layer, narrow, guide=guide)
    )


def feed_forward_elements(config: Config, layer: int, narrow: bool, *, guide: bool = False) -> int:
    """Elements a token that a rank keeps of a feed-forward layer beside its input.

    ``narrow``: the bottlenecks alone.

    ``guide``: while one takes part.
    """
    p, h, f = config.parallel.tensor, config.model.width, config.ffn_width
    shared = p if config.parallel.sequence else 1
    structure = ffn_structure(config, layer)
    # the activation's input, of two halves if gated, and its output; Megatron's gated one keeps the activated
    # half and the other one plus its offset too
    plain = not structure.dense and not guide
    wide = 2 * f // p
    if config.gated:
        wide = (3 if plain else 5) * f // p
    if structure.dense:
        return wide
    z_1, z_2 = structure.bottleneck(h, f), structure.bottleneck(f, h) // shared
    _, role, inputs, outputs = ffn_linears(config)[0]
    read = wide_factor(linear_tensors(structure, role, inputs, outputs, gated=config.gated))
    chunks = max(read.block_groups(p)) + 1
    if narrow:
        return min(z_1 // shared, z_1 // chunks) + z_2
    return wide + z_1 // chunks + z_2
