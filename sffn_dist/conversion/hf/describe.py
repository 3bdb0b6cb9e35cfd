"""The small files of an exported folder: config.json, generation_config.json and the tokenizer's, as
mappings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sffn_dist.conversion.hf.names import LLAMA, SFFN, STARCODER2, Family
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.split_table import configured_structure

FFN = Literal["merged", "structured"]
DType = Literal["fp32", "bf16"]
ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu", "swiglu": "silu"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# tokens that end a text, in the order in which data preparation looks for them
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


@dataclass(frozen=True)
class Special:
    """The token put after each document in training, which also begins a text: id and text, or neither."""

    id: int | None = None
    text: str | None = None


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
        # nothing pads here, though the end of text does in the tokenizer: torch trains no embedding of a
        # padding token
        "bos_token_id": special.id,
        "eos_token_id": special.id,
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
    """Generation ends with the end of text, and pads with it."""
    if special.id is None:
        return {"do_sample": False}
    return {
        "bos_token_id": special.id,
        "eos_token_id": special.id,
        "pad_token_id": special.id,
        "do_sample": False,
    }


def tokenizer_config_json(special: Special, length: int) -> dict[str, Any]:
    """tokenizer_config.json.

    The end of text also begins texts and pads: a batch of texts can be tokenized as it is.
    """
    tree: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        # what generate() takes: transformers 4 would give token_type_ids too
        "model_input_names": ["input_ids", "attention_mask"],
    }
    names = ("bos_token", "eos_token", "pad_token") if special.text is not None else ()
    return tree | dict.fromkeys(names, special.text)


def special_of(tokenizer: str | None) -> Special:
    """The end-of-text token of a tokenizer.json's text; raises ConfigError where it is no such thing."""
    if tokenizer is None:
        return Special()
    try:
        tree = json.loads(tokenizer)
        vocabulary = _vocabulary(tree["model"].get("vocab"))
        vocabulary |= {entry["content"]: int(entry["id"]) for entry in tree.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError([f"the tokenizer is no tokenizer.json: {type(error).__name__}: {error}"]) from None
    return next((Special(vocabulary[text], text) for text in SEPARATORS if text in vocabulary), Special())


def _vocabulary(vocab: Mapping[str, int] | list[Any] | None) -> dict[str, int]:
    """Text -> id; Unigram models keep a list of (text, score), whose place is the id."""
    if isinstance(vocab, list):
        return {entry[0]: index for index, entry in enumerate(vocab)}
    return {text: int(index) for text, index in (vocab or {}).items() if text in SEPARATORS}
