"""The small files of an exported folder: config.json, generation_config.json and the tokenizer's, as
mappings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sffn_dist.checkpoint.weights import Weights
from sffn_dist.conversion.hf.names import LLAMA, SFFN, STARCODER2, Family
from sffn_dist.data import tokenizer_files
from sffn_dist.data.tokenizer_files import IDS
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.split_table import configured_structure

FFN = Literal["merged", "structured"]
DType = Literal["fp32", "bf16"]
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu", "swiglu": "silu"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SPECIAL = ("bos_token", "eos_token", "pad_token")
# of a tokenizer_config.json: what a tokenizer.json says itself, and what names files of another folder
OBSOLETE = (
    "tokenizer_class", "added_tokens_decoder", "auto_map", "legacy", "sp_model_kwargs", "name_or_path",
    "special_tokens_map_file", "tokenizer_file", "vocab_file", "add_prefix_space", "backend", "is_local",
)  # fmt: skip


@dataclass(frozen=True)
class Special:
    """What a model's tokenizer says besides its tokens, as its two files hold it."""

    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


def family_of(config: Config, ffn: FFN) -> Family:
    """The architecture that an export is of.

    Raises ConfigError where none has this norm with this activation.
    """
    if ffn == "structured":
        if not configured_structure(config, config.ffn.kind).in_modeling_file:
            raise ConfigError(
                [
                    f"ffn.kind = {config.ffn.kind}: modeling_sffn.py does not compute it; export the model "
                    f"as merged, which is dense"
                ]
            )
        return SFFN
    model = config.model
    if (model.norm, config.gated) == ("layernorm", False):
        return STARCODER2
    if (model.norm, config.gated) != ("rmsnorm", True):
        raise ConfigError(
            [
                f"model.norm = {model.norm} with model.activation = {model.activation}: neither "
                f"{LLAMA.architecture} (rmsnorm, swiglu) "
                f"nor {STARCODER2.architecture} (layernorm, gelu or gelu_erf) has both; export it as "
                f"structured, which has"
            ]
        )
    if model.width % model.heads:
        raise ConfigError(
            [
                f"model.heads = {model.heads}: {LLAMA.architecture} wants it to divide model.width = "
                f"{model.width}; "
                "export it as structured, which does not"
            ]
        )
    return LLAMA


def config_json(
    config: Config, family: Family, dtype: DType, special: Special, alpha: float | None, step: int
) -> dict[str, Any]:
    """config.json of a model of ``family``. ``alpha`` is the weight of its guides, None without."""
    model = config.model
    tree: dict[str, Any] = {
        "architectures": [family.architecture],
        **_sizes(config),
        "hidden_act": ACTIVATIONS[model.activation],
        "initializer_range": min(model.init_std, 1.0),  # transformers takes none above 1
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": float(model.rope_base),  # where transformers 4 reads it, and 5
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rope_base)},
        "attention_dropout": 0.0,
        "use_cache": True,
        # nothing pads here, though a token may in the tokenizer: torch trains no embedding of a padding
        # token
        "bos_token_id": special.generation.get("bos_token_id"),
        "eos_token_id": special.generation.get("eos_token_id"),
        "pad_token_id": None,
        "dtype": DTYPES[dtype],
    }
    if config.vocab_unpadded < model.vocab:
        tree["unpadded_vocab_size"] = config.vocab_unpadded  # of ours, which an import reads again
    if family is STARCODER2:
        dropouts = dict.fromkeys(("residual_dropout", "embedding_dropout"), 0.0)
        starcoder = {
            "norm_epsilon": model.norm_epsilon,
            "use_bias": model.bias,
            "sliding_window": None,
            **dropouts,
        }
        return {"model_type": "starcoder2", **tree, **starcoder}
    tree |= {"rms_norm_eps": model.norm_epsilon, "attention_bias": model.bias, "mlp_bias": model.bias}
    if family is LLAMA:
        return {"model_type": "llama", **tree}
    return {
        "model_type": "sffn",
        **tree,
        **_structured(config),
        "guide_alpha": None if alpha is None else float(alpha),
        "training_steps": step,
    }


def _sizes(config: Config) -> dict[str, int]:
    model = config.model
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": model.sequence,
    }


def _structured(config: Config) -> dict[str, Any]:
    """What modeling_sffn.SffnConfig has beyond LlamaConfig."""
    structure = configured_structure(config, config.ffn.kind)
    return {
        "auto_map": {
            "AutoConfig": "modeling_sffn.SffnConfig",
            "AutoModel": "modeling_sffn.SffnModel",
            "AutoModelForCausalLM": "modeling_sffn.SffnForCausalLM",
        },
        "norm": config.model.norm,
        "gated": config.gated,
        "ffn_kind": structure.kind,
        "ffn_rank": structure.rank,
        "ffn_blocks": structure.blocks,
        "dense_layers": list(config.ffn.dense_layers),
    }


def generation_config_json(special: Special) -> dict[str, Any]:
    """What the model's folder said of generation; else it is greedy, ends with the end of text and pads with
    it.
    """
    known = {key: value for key, value in special.generation.items() if value is not None}
    return known if set(known) - set(IDS) else {**known, "do_sample": False}


def tokenizer_config_json(special: Special, length: int, trained: bool) -> dict[str, Any]:
    """tokenizer_config.json: special tokens, chat template and what else the model's folder said.

    The tokenizer.json alone says how text is encoded. ``trained``: it adds what training put around
    documents, whatever the folder said of that.
    """
    left_out = {*OBSOLETE, *(("add_bos_token", "add_eos_token") if trained else ())}
    kept = {key: value for key, value in special.tokenizer.items() if key not in left_out}
    return {
        "clean_up_tokenization_spaces": False,
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        # what generate() takes: transformers 4 would give token_type_ids too
        "model_input_names": ["input_ids", "attention_mask"],
    }


def special_of(weights: Weights) -> Special:
    """What goes with the tokenizer of a model; raises ConfigError where that is no tokenizer.json.

    A checkpoint of a version that carried no settings: its end of text also begins texts and pads.
    """
    if weights.tokenizer is None:
        return Special()
    try:
        ids = tokenizer_files.vocabulary(weights.tokenizer)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError([f"the tokenizer is no tokenizer.json: {type(error).__name__}: {error}"]) from None
    if weights.tokenizer_settings:
        trees = {name: json.loads(text) for name, text in weights.tokenizer_settings.items()}
        tokenizer = trees.get(tokenizer_files.TOKENIZER_CONFIG, {})
        generation = trees.get(tokenizer_files.GENERATION_CONFIG, {})
    else:
        end = next((text for text in tokenizer_files.EARLIER_SEPARATORS if text in ids), None)
        names = ("bos_token", "eos_token", "pad_token") if end is not None else ()
        tokenizer, generation = dict.fromkeys(names, end), {}
    stated = {f"{name}_id": tokenizer_files.token_text(tokenizer.get(name)) for name in SPECIAL}
    known = {key: ids[text] for key, text in stated.items() if text is not None and text in ids}
    return Special(tokenizer, {**known, **generation})
