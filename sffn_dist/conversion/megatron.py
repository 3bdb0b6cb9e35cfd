"""Dense GPTs of megatron-core (Megatron-LM), as :class:`Weights`: what they are in the terms of the config
here.

Their tensors are ours by name and layout. Transformer Engine keeps a norm in the linear behind it; a norm ``1
+ w`` becomes a plain one; linears without a bias, beside others with one, get zeros.

GELU: Megatron-LM's own is exact, but fused with the bias, which is its default, it is the tanh form 0.5 x (1
+ tanh(0.79788456 x (1 + 0.044715 x^2))): what such a model was trained with is "gelu" here, the exact form
"gelu_erf".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffn_dist.checkpoint.weights import Weights, untie
from sffn_dist.conversion import inferred_config
from sffn_dist.conversion.megatron_files import open_checkpoint
from sffn_dist.conversion.megatron_tensor import MegatronCheckpoint, MegatronTensor
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import model_tensors
from sffn_dist.structured.structure import Shapes

FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
HALVES = ("_w", "_v")  # of a gated linear_fc1 that was saved as two tensors
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
RECIPE = {
    "train_iters": "steps",
    "global_batch_size": "global_batch_size",
    "micro_batch_size": "micro_batch_size",
    "seed": "seed",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_eps": "epsilon",
    "clip_grad": "clip",
}
# argument -> values that the model here computes with, beside None; and what anything else means
FITS: dict[str, tuple[tuple[Any, ...], str]] = {
    "rotary_percent": ((1, 1.0), "turns part of each head; rotary embeddings here turn all of it"),
    "rotary_interleaved": ((False,), "turns pairs; rotary embeddings here turn halves of a head"),
    "rotary_seq_len_interpolation_factor": ((1, 1.0), "scales positions; those here are not scaled"),
    "use_rope_scaling": ((False,), "scales positions; those here are not scaled"),
    "num_experts": ((), "routes tokens to experts; feed-forward layers here have one"),
    "multi_latent_attention": ((False,), "is another attention than grouped heads"),
    "qk_layernorm": ((False,), "normalises queries and keys, which attention here does not"),
    "qk_l2_norm": ((False,), "normalises queries and keys, which attention here does not"),
    "squared_relu": ((False,), "is an activation that models here do not have"),
    "quick_geglu": ((False,), "is an activation that models here do not have"),
    "normalization": (("LayerNorm", "RMSNorm"), "must be LayerNorm or RMSNorm"),
    "apply_residual_connection_post_layernorm": ((False,), "adds after the norm; layers here are pre-norm"),
    "window_size": ((), "limits attention to a window"),
    "attention_output_gate": ((False,), "gates attention's output"),
    "softmax_type": (("vanilla",), "is another softmax"),
    "mtp_num_layers": ((0,), "predicts several tokens at once"),
    "activation_func_clamp_value": ((), "clamps the activation"),
    "glu_linear_offset": ((0, 0.0), "shifts the gated activation"),
    "use_mup": ((False,), "scales by width"),
    "spec": ((), "builds layers by a module of the user's"),
    "kitchen_config_file": ((), "quantises layers"),
    "hybrid_override_pattern": ((), "mixes other layers in"),
    "no_rope_freq": ((), "leaves layers without positions"),
}


def read(path: Path, overrides: Sequence[str] = ()) -> Weights:
    """The model in a Megatron checkpoint: an iteration's folder, or a root with
    ``latest_checkpointed_iteration.txt``.

    Config from the tensors' shapes and Megatron-LM's ``args``; ``overrides`` (``key=value``) win. Where no
    args were kept, ``model.heads`` must be given, and ``model.activation`` unless it is gated. Raises
    ConfigError, with every reason, if the model cannot be built here.
    """
    checkpoint = open_checkpoint(path)
    entries = _named(checkpoint)
    _representable(checkpoint, entries)
    model_settings = _model_settings(checkpoint, entries, overrides)
    config = inferred_config.config_of(
        str(checkpoint.folder),
        {name: entry.shape for name, entry in entries.items()},
        model_settings,
        overrides,
        train={"steps": max(checkpoint.iteration, 1), **inferred_config.recipe(checkpoint.arguments, RECIPE)},
        guide={},
    )
    notices = [f"not imported: {name}" for name in checkpoint.unused]
    if config.model.tie_embeddings and _untied(entries):
        config = untie(config)
        notices.append(
            "output_layer.weight differs from the embedding, though the model is said to tie them: kept, as "
            "model.tie_embeddings = false"
        )
    shapes = {name: spec.shape for name, spec in model_tensors(config, guide=False).items()}
    if config.model.bias:
        entries = {**_zero_biases(entries, shapes), **entries}
    spare = frozenset({inferred_config.OUTPUT} if config.model.tie_embeddings else ())
    problems = inferred_config.mismatches(
        {name: entry.shape for name, entry in entries.items()}, shapes, spare=spare
    )
    if problems:
        raise ConfigError([f"{checkpoint.folder}: {problem}" for problem in problems])
    shifted = checkpoint.arguments.get("apply_layernorm_1p") is True

    def full(name: str) -> Tensor:
        tensor = entries[name].read()
        return tensor.add_(1.0) if shifted and name.endswith("layernorm.weight") else tensor

    facts = {"format": "megatron", "arguments": _plain(checkpoint.arguments)}
    return Weights(
        config=config,
        full=full,
        origin=str(checkpoint.folder),
        step=checkpoint.iteration,
        facts=facts,
        notices=tuple(notices),
    )


def _untied(entries: Mapping[str, MegatronTensor]) -> bool:
    """Whether there is an output layer, and it is not the embedding."""
    table, head = entries[inferred_config.TABLE], entries.get(inferred_config.OUTPUT)
    return head is not None and (head.shape != table.shape or not torch.equal(head.read(), table.read()))


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments is text and numbers."""
    return {
        key: value for key, value in sorted(arguments.items()) if isinstance(value, str | int | float | bool)
    }


def _named(checkpoint: MegatronCheckpoint) -> dict[str, MegatronTensor]:
    """Entries by our names: fused norms under their own, halves of a gated linear as one."""
    entries: dict[str, MegatronTensor] = {}
    for name, entry in checkpoint.entries.items():
        prefix, _, rest = name.partition(".layers.")
        layer, _, leaf = rest.partition(".")
        if prefix == "decoder" and leaf in FUSED:
            name = f"decoder.layers.{layer}.{FUSED[leaf]}"
        if name.endswith(HALVES) and ".linear_fc1." in name:
            gate, up = (checkpoint.entries.get(name[:-2] + half) for half in HALVES)
            if gate is not None and up is not None:
                shape = (gate.shape[0] + up.shape[0], *gate.shape[1:])
                both = functools.partial(_read_both, gate, up)
                entries[name[:-2]] = MegatronTensor(shape, both)
                continue
        entries[name] = entry
    return entries


def _read_both(gate: MegatronTensor, up: MegatronTensor) -> Tensor:
    return torch.cat([gate.read(), up.read()])


def _representable(checkpoint: MegatronCheckpoint, entries: Mapping[str, MegatronTensor]) -> None:
    """Raises ConfigError with everything about the model that has no counterpart here."""
    arguments, problems = checkpoint.arguments, []
    kind = arguments.get("position_embedding_type", "rope")
    rope = kind == "rope" or (
        kind == "learned_absolute" and arguments.get("use_rotary_position_embeddings") is True
    )
    if not rope or any("position_embeddings" in name for name in entries):
        problems.append(f"position_embedding_type = {kind!r}: models here have rotary embeddings")
    for key, (values, meaning) in FITS.items():
        value = arguments.get(key)
        if value is not None and not any(
            value is fit or (type(value) is type(fit) and value == fit) for fit in values
        ):
            problems.append(f"{key} = {str(value)[:40]}: {meaning}")
    if any(".experts." in name or ".router." in name for name in entries) and not arguments.get(
        "num_experts"
    ):
        problems.append("routes tokens to experts; feed-forward layers here have one")
    if problems:
        raise ConfigError([f"{checkpoint.folder}: {problem}" for problem in problems])


def _model_settings(
    checkpoint: MegatronCheckpoint, entries: Mapping[str, MegatronTensor], overrides: Sequence[str]
) -> dict[str, Any]:
    """Settings of the model section that no shape shows; raises ConfigError if one of them is nowhere."""
    arguments = checkpoint.arguments
    names = {
        "heads": ("num_attention_heads",),
        "sequence": ("max_position_embeddings", "seq_length"),
        "rope_base": ("rotary_base",),
        "norm_epsilon": ("norm_epsilon", "layernorm_epsilon"),
    }
    settings: dict[str, Any] = {}
    for ours, theirs in names.items():
        value = next((arguments[key] for key in theirs if arguments.get(key) is not None), None)
        if value is not None:
            settings[ours] = (
                int(value)
                if ours == "rope_base" and isinstance(value, float) and value.is_integer()
                else value
            )
    untied = arguments.get("untie_embeddings_and_output_weights")
    if isinstance(untied, bool):
        settings["tie_embeddings"] = not untied
    if _gated(entries):
        if arguments.get("swiglu") is False:
            raise ConfigError(
                [f"{checkpoint.folder}: its gated activation is not swiglu, which alone models here have"]
            )
    elif arguments:
        settings["activation"] = "gelu" if _tanh(arguments) else "gelu_erf"
    overridden: dict[str, Any] = {}
    loading.override(overridden, overrides)
    needed = {"heads": "how many heads attention has"}
    if not _gated(entries):
        needed["activation"] = "which GELU it has, gelu (the tanh form) or gelu_erf"
    unknown = [key for key in needed if key not in settings and key not in overridden.get("model", {})]
    if unknown:
        raise ConfigError(
            [
                f"{checkpoint.folder}: does not say {needed[key]}; give it as model.{key}=..."
                for key in unknown
            ]
        )
    return settings


def _gated(entries: Mapping[str, MegatronTensor]) -> bool:
    first, second = (entries.get(f"decoder.layers.0.mlp.linear_fc{number}.weight") for number in (1, 2))
    return (
        first is not None
        and second is not None
        and len(second.shape) == 2
        and first.shape[0] == 2 * second.shape[1]
    )


def _tanh(arguments: Mapping[str, Any]) -> bool:
    """Whether GELU was computed in its tanh form: by name, or by the fusion with the bias, which needs
    one.
    """
    if arguments.get("openai_gelu") is True:
        return True
    return arguments.get("bias_gelu_fusion", True) is True and arguments.get("add_bias_linear", True) is True


def _zero_biases(entries: Mapping[str, MegatronTensor], shapes: Shapes) -> dict[str, MegatronTensor]:
    """Zeros for the biases of linears that have none in any layer: Megatron's ``add_qkv_bias`` gives them
    to linear_qkv alone.
    """
    bare = [linear for linear in LINEARS if not any(name.endswith(f"{linear}.bias") for name in entries)]

    def zeros(shape: tuple[int, ...]) -> MegatronTensor:
        return MegatronTensor(shape, functools.partial(torch.zeros, shape))

    return {
        name: zeros(shape)
        for name, shape in shapes.items()
        if name.endswith(".bias") and name.removesuffix(".bias").endswith(tuple(bare))
    }
