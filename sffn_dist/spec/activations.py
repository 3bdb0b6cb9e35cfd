"""Bytes of activations that a rank holds at the fullest moment of one micro-batch's forward and backward
pass. Standard library only.

Each moment is what is kept for backward by then, and what the operation at hand makes. Weights and their
gradients are not in it, but for a gradient between its making and its adding to the one that stands.

Sizes: T tokens of the micro-batch, T' a rank's own (T/p with sequence parallelism, else T); h width; of a
rank, one of p: f inner width, F = f or 2f (gated), a the attention's width, k that of its keys, V rows of the
embedding; z_1 and z_2 the bottlenecks; e bytes of an element. What a layer keeps, times e:

    norm (twice)        T' h, its output; two fp32 numbers a token beside it. RMSNorm in several steps, as
                        on CPUs: T' h in fp32 normalised, and in bf16 the input in fp32 in place of the stream
    attention           T (a + 2k) of linear_qkv (of all ranks where it is gathered), T a rotated queries, T k
                        rotated keys, T a the output, an fp32 number a head and token. Where key/value heads
                        are repeated: T a queries, T 2a repeated keys and values, T a the output
    residual (twice)    T' h, the sum
    feed-forward        dense, or Megatron's code between two structured linears: T F + T f, the activation's
                        input and output; gated T 5f: both halves, silu of one, the other plus its offset,
                        their product
                        structured: T F + T f, also where gated if it is one operation; T z_1, T' z_2
                        recompute: bottleneck: the lesser of T' z_1 and T z_1's chunk, and T' z_2
    recompute: full     T' h, the layer's input; all of the above for one layer at a time

The moments:

    loss                all layers, the embedding's and the last norm's output, and the logits: in bf16 and
                        fp32, T V (2 + 4); in fp32, T V 4, overwritten in place
    output layer        the same, but the gradients of the logits, T V e, of the hidden state, T h e, and of
                        the table, V h e, which, tied, waits for the embedding's to the end
    last norm           all layers, and the gradient of its input
    feed-forward i      layers before i, layer i, and what its backward pass makes (FeedForward.backward)
    recomputed i        recompute: full, the same layers; the stream's gradient, which a linear by Megatron
                        gathers before it asks for what it kept, and the output of the second linear or of
                        attention's, T h, before that is scattered
    attention i         layers before i, of layer i the first norm and the attention; the gradients of its
                        output, queries, keys and values
    embedding           both gradients of the table and their sum, that of the embedding's output
"""

from __future__ import annotations

from sffn_dist.spec.config import Config
from sffn_dist.spec.feed_forward_activations import FeedForward
from sffn_dist.spec.layer_activations import MicroBatch
from sffn_dist.spec.split_table import configured_structure


def activation_bytes(config: Config, precision: str, *, guide: bool = False, cuda: bool = False) -> int:
    """Bytes at the fullest moment.

    ``guide``: while it lasts, and every linear computes its own. ``cuda``: by CUDA's operators, which norm in
    one pass and in bf16 read grouped key/value heads as they are.
    """
    return max(moments(config, precision, guide=guide, cuda=cuda).values())


def moments(config: Config, precision: str, *, guide: bool = False, cuda: bool = False) -> dict[str, int]:
    """Bytes at each moment that may be the fullest, by its name."""
    part = MicroBatch(config, 2 if precision == "bf16" else 4, guide, cuda)
    kinds = [config.kind_of_layer(layer) for layer in range(config.model.layers)]
    layers = {kind: FeedForward(part, configured_structure(config, kind)) for kind in set(kinds)}
    full = config.recompute == "full"
    kept = {kind: part.stream if full else _layer_kept(part, layer) for kind, layer in layers.items()}
    at_end = part.gathered + part.stream + sum(kept[kind] for kind in kinds)
    found = {
        "loss": at_end + part.norm_kept + part.logits,
        "output layer": at_end + part.norm_kept + part.output_layer_backward,
        "last norm": at_end + part.norm_kept + part.table_waits + part.norm_backward,
        "embedding": part.gathered + part.embedding_backward,
    }
    before = part.gathered + part.stream + part.table_waits
    for i, kind in enumerate(kinds):
        layer = layers[kind]
        held = before + (part.input_beside_norm if full else 0)
        found[f"feed-forward {i}"] = held + _layer_kept(part, layer) + layer.backward
        found[f"attention {i}"] = held + part.attention_backward
        if full:
            recomputed = max(_layer_kept(part, layer) + layer.output, part.stream + part.attention_forward)
            found[f"recomputed {i}"] = held + layer.gathered + recomputed
        before += kept[kind]
    return found


def _layer_kept(part: MicroBatch, feed_forward: FeedForward) -> int:
    """All that one layer keeps, its output in place of its input."""
    return 2 * part.norm_kept + part.attention_kept + 2 * part.stream + feed_forward.kept
