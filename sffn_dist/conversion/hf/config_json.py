"""config.json read: what a folder's model is in our terms.

What this project's model cannot represent is refused with every reason at once, each by config.json's own key
and value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sffn_dist.conversion import downloads
from sffn_dist.conversion.hf.names import FAMILIES, SFFN, Family
from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.structured import registry

NAME = "config.json"
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # one formula under three names
GELU = dict.fromkeys(TANH_GELU, "gelu") | {"gelu": "gelu_erf"}
SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
# what transformers assumes where config.json is silent, by model_type
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
    "starcoder2": {
        "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096, "norm_epsilon": 1e-5,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True, "use_bias": True,
    },
    "gpt_neox": {
        "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "attention_bias": True, "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    "sffn": {
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "norm": "rmsnorm", "ffn_kind": registry.DENSE,
    },
}  # fmt: skip
OWN_CODE = "modeling_sffn."  # of structured exports; nothing of it is run here
EPSILON = {"starcoder2": "norm_epsilon", "gpt_neox": "layer_norm_eps"}  # else rms_norm_eps


@dataclass(frozen=True)
class Description:
    """A folder's model: ours, and what of it the folder's tensors do not show."""

    config: Config
    family: Family
    model_type: str
    without_bias: frozenset[str]  # modules of a layer (our names) that have no bias there, and zeros here
    guide_alpha: float | None
    step: int


@dataclass
class Values:
    """The values of config.json by key, with what is wrong with them."""

    tree: Mapping[str, Any]
    defaults: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The value; transformers' default where the key is missing."""
        return self.tree.get(key, self.defaults.get(key))

    def refuse(self, key: str, rule: str) -> None:
        self.problems.append(f"{key} = {shown(self.get(key))}: {rule}")

    def integer(self, key: str) -> int:
        """A required positive whole number."""
        value = self.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53:
            return value
        self.refuse(key, "must be a positive whole number")
        return 1

    def integer_or(self, key: str, otherwise: int | None) -> int | None:
        """A positive whole number, or ``otherwise`` where it is null or missing."""
        return otherwise if self.get(key) is None else self.integer(key)

    def number(self, key: str, otherwise: float = 0.0) -> float:
        """A finite number that is not negative."""
        value = self.get(key)
        value = otherwise if value is None else value
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and 0 <= value < 1e300
            and math.isfinite(value)
        ):
            return float(value)
        self.refuse(key, "must be a number")
        return otherwise

    def flag(self, key: str) -> bool:
        """True or false; missing and null are false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value is True

    def choice(self, key: str, choices: Mapping[str, str]) -> str:
        """One of ``choices``, translated."""
        value = self.get(key)
        if isinstance(value, str) and value in choices:
            return choices[value]
        self.refuse(key, f"this model has {' or '.join(choices)}")
        return next(iter(choices.values()))


def shown(value: Any) -> str:
    """A value as in the file, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read(folder: Path) -> Description:
    """The folder's model; raises ConfigError with every reason why it cannot be ours."""
    path = folder / NAME
    tree = read_object(path)
    model_type = tree.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError([f"{path}: model_type = {shown(model_type)}: must be one of {', '.join(FAMILIES)}"])
    values = Values(tree, DEFAULTS[model_type])
    config_tree, without_bias = _tree(values, model_type)
    _refuse_what_differs(values, model_type)
    alpha = (
        None if values.get("guide_alpha") is None or model_type != "sffn" else values.number("guide_alpha")
    )
    step = (
        values.integer_or("training_steps", 0)
        if model_type == "sffn" and values.get("training_steps") != 0
        else 0
    )
    if alpha is not None and alpha > 1:
        values.refuse("guide_alpha", "must be between 0 and 1")
    if values.problems:
        raise ConfigError([f"{path}: {problem}" for problem in dict.fromkeys(values.problems)])
    try:
        config = loading.from_tree(config_tree)
    except ConfigError as error:
        raise ConfigError(
            [f"{path}: in this project's terms {problem}" for problem in error.problems]
        ) from None
    return Description(config, FAMILIES[model_type], model_type, without_bias, alpha, step or 0)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ConfigError naming it."""
    downloads.check(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; a Hugging Face model folder has one"]) from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, not JSON, a number too long
        raise ConfigError([f"{path}: cannot be read as JSON: {error}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: holds a {type(tree).__name__}, must hold an object"])
    return tree


def _tree(values: Values, model_type: str) -> tuple[dict[str, Any], frozenset[str]]:
    """The tree of our config, and the modules without bias."""
    family = FAMILIES[model_type]
    gated = "mlp.gate_proj" in family.modules["mlp.linear_fc1"] or (family is SFFN and values.flag("gated"))
    layernorm = model_type in EPSILON or (
        family is SFFN and values.choice("norm", {"layernorm": "layernorm", "rmsnorm": ""})
    )
    biases = _biases(values, model_type)
    heads = values.integer("num_attention_heads")
    width = values.integer("hidden_size")
    head_dim = None if model_type == "gpt_neox" else values.integer_or("head_dim", None)
    epsilon = EPSILON.get(model_type, "rms_norm_eps")
    if head_dim is None and width % heads:
        values.refuse("num_attention_heads", f"must divide hidden_size = {width}")
    model = {
        "layers": values.integer("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": heads if model_type == "gpt_neox" else values.integer_or("num_key_value_heads", heads),
        "attention_dim": heads * (head_dim or max(1, width // heads)),
        "sequence": values.integer("max_position_embeddings"),
        "vocab": values.integer("vocab_size"),
        "vocab_unpadded": values.integer_or("unpadded_vocab_size", None),
        "norm": "layernorm" if layernorm else "rmsnorm",
        "norm_epsilon": values.number(epsilon),
        "activation": values.choice("hidden_act", SWIGLU if gated else GELU),
        "bias": any(biases.values()),
        "tie_embeddings": values.flag("tie_word_embeddings"),
        "rope_base": _rope_base(values),
        "init_std": values.number("initializer_range", 0.02) or 0.02,
    }
    if not model["norm_epsilon"]:
        values.refuse(epsilon, "must be positive")
    without_bias = frozenset(module for module, has_bias in biases.items() if not has_bias)
    return {"model": model, "ffn": _ffn(values, model_type), "train": {"steps": 1}}, without_bias


def _ffn(values: Values, model_type: str) -> dict[str, Any]:
    section: dict[str, Any] = {"kind": registry.DENSE, "width": values.integer("intermediate_size")}
    if model_type != "sffn":
        return section
    kinds = [kind for kind in registry.kinds() if registry.structure_class(kind).in_modeling_file]
    layers = values.get("dense_layers")
    if not isinstance(layers, list) or not all(
        isinstance(layer, int) and not isinstance(layer, bool) for layer in layers
    ):
        values.refuse("dense_layers", "must be a list of layers")
    section |= {
        "kind": values.choice("ffn_kind", dict(zip(kinds, kinds, strict=True))),
        "dense_layers": layers,
    }
    return section | {
        "rank": values.integer_or("ffn_rank", None),
        "blocks": values.integer_or("ffn_blocks", None),
    }


def _biases(values: Values, model_type: str) -> dict[str, bool]:
    """Module of a layer -> whether it has a bias there."""
    if model_type == "starcoder2":
        qkv = out = mlp = values.flag("use_bias")
    elif model_type == "gpt_neox":
        qkv, mlp = values.flag("attention_bias"), True
        out = qkv
    elif model_type == "qwen2":
        qkv, out, mlp = True, False, False
    elif model_type == "mistral":
        qkv = out = mlp = False
    else:
        qkv, mlp = values.flag("attention_bias"), values.flag("mlp_bias")
        out = qkv
    return {
        "self_attention.linear_qkv": qkv,
        "self_attention.linear_proj": out,
        "mlp.linear_fc1": mlp,
        "mlp.linear_fc2": mlp,
    }


def _rope(values: Values) -> Mapping[str, Any]:
    """transformers 5 has everything of rotary embeddings in ``rope_parameters``, 4 had ``rope_scaling``
    beside ``rope_theta``.
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            values.refuse(key, "must be an object")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(part, dict) for part in rope.values()):
            values.refuse(
                key,
                "this model's rotary embeddings are the default ones, not scaled, the same in every layer",
            )
        return rope
    return {}


def _rope_base(values: Values) -> int:
    rope = _rope(values)
    flat = next(
        (key for key in ("rope_theta", "rotary_emb_base") if values.get(key) is not None), "rope_theta"
    )
    key = "rope_theta" if rope.get("rope_theta") is not None else flat
    base = rope.get("rope_theta", values.get(flat))
    base = 10_000 if base is None else base
    if (
        isinstance(base, bool)
        or not isinstance(base, (int, float))
        or not 0 < base < 2**53
        or base != int(base)
    ):
        values.problems.append(f"{key} = {shown(base)}: must be a positive whole number")
        return 1
    for name in ("partial_rotary_factor", "rotary_pct"):
        share = rope.get(name, values.tree.get(name))
        if name == "rotary_pct" and share is None and rope.get("partial_rotary_factor") is None:
            share = values.get(name)
        if share is not None and (isinstance(share, bool) or share != 1):
            values.problems.append(f"{name} = {shown(share)}: this model turns all of a head, must be 1")
    return int(base)


def _refuse_what_differs(values: Values, model_type: str) -> None:
    """Settings that change the computation and that our model has not."""
    code = values.get("auto_map")
    own_code = isinstance(code, dict) and all(
        isinstance(name, str) and name.startswith(OWN_CODE) for name in code.values()
    )
    if code is not None and not (model_type == "sffn" and own_code):
        values.refuse(
            "auto_map",
            f"the folder brings code of its own, which is not run: it may not be a plain {model_type}",
        )
    window, length = values.get("sliding_window"), values.get("max_position_embeddings")
    slides = window is not None and (model_type != "qwen2" or values.flag("use_sliding_window"))
    wide = isinstance(window, int) and isinstance(length, int) and window >= length
    if slides and not wide and model_type != "gpt_neox":  # a window over the whole context is none
        values.refuse("sliding_window", "every position attends to all before it here; must be null")
    layer_types = values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        values.refuse("layer_types", 'must be "full_attention" for every layer')
    if model_type == "gpt_neox" and values.flag("use_parallel_residual"):
        values.refuse(
            "use_parallel_residual", "attention and feed-forward follow one another here; must be false"
        )
    if values.get("quantization_config") is not None:
        values.refuse("quantization_config", "weights must be floating-point numbers")
    if values.get("is_encoder_decoder") is True or values.get("add_cross_attention") is True:
        values.refuse("is_encoder_decoder", "this is a decoder alone")
