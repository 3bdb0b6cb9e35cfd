"""What a model's tensors show of its config: every size but the number of heads, and which layers are
structured in which way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.structured.registry import DENSE, from_factor_shapes
from sffn_dist.structured.structure import Shapes, StructuredMatrix

TABLE, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYERS = "decoder.layers."
BATCHES = ("global_batch_size", "micro_batch_size")
POSITIVE = ("learning_rate", "epsilon", "steps", *BATCHES)
FLOATS = (
    "learning_rate",
    "epsilon",
    "weight_decay",
    "clip",
    "warmup_share",
    "min_learning_rate_ratio",
    "beta1",
    "beta2",
)


def config_of(
    origin: str,
    shapes: Shapes,
    model_settings: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    train: Mapping[str, Any],
    guide: Mapping[str, Any],
) -> Config:
    """The config of a model with tensors of these shapes.

    ``model_settings`` win over what the shapes give, and ``overrides`` win over all.
    Raises ConfigError where the shapes are of no model, or nothing gives ``model.heads``.
    """
    overridden: dict[str, Any] = {}
    loading.override(overridden, overrides)
    heads = overridden.get("model", {}).get("heads") or model_settings.get("heads")
    if not isinstance(heads, int) or heads < 1:
        raise ConfigError(
            [f"{origin}: does not say how many heads attention has; give it as model.heads=..."]
        )
    try:
        model, ffn = _model(shapes, heads), _ffn(shapes)
    except (KeyError, IndexError, StopIteration, ValueError, ZeroDivisionError) as error:
        raise ConfigError([f"{origin}: not all of a GPT is in it: {type(error).__name__}: {error}"]) from None
    tree: dict[str, Any] = {
        "model": {**model, **model_settings},
        "ffn": ffn,
        "train": dict(train),
        "guide": dict(guide),
    }
    loading.override(tree, overrides)
    return loading.from_tree(tree)


def _model(shapes: Shapes, heads: int) -> dict[str, Any]:
    """The model section; raises KeyError for a tensor that is not there."""
    first = f"{LAYERS}0."
    vocab, width = shapes[TABLE]
    attention = shapes[f"{first}self_attention.linear_proj.weight"][1]
    rows = shapes[f"{first}self_attention.linear_qkv.weight"][0]
    wide, inner = (
        linear_of(shapes, f"{first}mlp.linear_fc1").outputs,
        linear_of(shapes, f"{first}mlp.linear_fc2").inputs,
    )
    return {
        "layers": 1 + max(layer_of(name) for name in shapes if name.startswith(LAYERS)),
        "width": width,
        "heads": heads,
        "kv_heads": (rows - attention) // 2 * heads // attention,
        "attention_dim": attention,
        "vocab": vocab,
        "norm": "layernorm" if "decoder.final_layernorm.bias" in shapes else "rmsnorm",
        "activation": "swiglu" if wide == 2 * inner else "gelu",
        "bias": any(name.endswith(".bias") and "layernorm" not in name for name in shapes),
        "tie_embeddings": OUTPUT not in shapes,
    }


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


def linear_of(shapes: Shapes, linear: str) -> StructuredMatrix:
    """Structure and sizes of a feed-forward linear; raises KeyError for factors of no structure."""
    own = {
        name.removeprefix(f"{linear}."): shape
        for name, shape in shapes.items()
        if name.startswith(f"{linear}.")
    }
    factors = {leaf: shape for leaf, shape in own.items() if leaf not in ("guide", "bias")}
    try:
        return from_factor_shapes(factors)
    except KeyError as error:
        raise KeyError(f"{linear}: {error.args[0]}") from None


def _ffn(shapes: Shapes) -> dict[str, Any]:
    """The ffn section: kind, rank and blocks of the layers that are not dense.

    Raises ValueError if they differ in kind.
    """
    layers = sorted({layer_of(name) for name in shapes if name.startswith(LAYERS)})
    structures = {layer: linear_of(shapes, f"{LAYERS}{layer}.mlp.linear_fc1").structure for layer in layers}
    structured = {layer: structure for layer, structure in structures.items() if not structure.dense}
    kinds = sorted({structure.kind for structure in structured.values()})
    if len(kinds) > 1:
        raise ValueError(f"layers of kinds {kinds} in one model")
    ffn: dict[str, Any] = {"width": linear_of(shapes, f"{LAYERS}0.mlp.linear_fc2").inputs}
    if not structured:
        return {**ffn, "kind": DENSE}
    structure = next(iter(structured.values()))
    settings = {name: getattr(structure, name) for name in structure.settings}
    return {
        **ffn,
        "kind": structure.kind,
        "dense_layers": [layer for layer in layers if layer not in structured],
        **settings,
    }


def recipe(settings: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the train section, by ``table`` (theirs -> ours), where they are numbers that ours can
    take.

    A recipe is worth keeping; but no model hangs on it, and so what does not fit is left at its default.
    """
    train_settings: dict[str, Any] = {}
    for theirs, ours in table.items():
        value = settings.get(theirs)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (
            not (whole or (isinstance(value, float) and ours in FLOATS))
            or value is None
            or not 0 <= value < 2**53
        ):
            continue
        share = ours in ("warmup_share", "min_learning_rate_ratio") and value > 1
        open_share = ours in ("beta1", "beta2") and not 0 < value < 1
        if not (share or open_share or (ours in POSITIVE and value == 0)):
            train_settings[ours] = float(value) if ours in FLOATS else value
    if (
        not all(key in train_settings for key in BATCHES)
        or train_settings["global_batch_size"] % train_settings["micro_batch_size"]
    ):
        train_settings = {key: value for key, value in train_settings.items() if key not in BATCHES}
    return train_settings


def mismatches(shapes: Shapes, expected: Shapes, *, spare: frozenset[str] = frozenset()) -> list[str]:
    """A sentence for each tensor that is missing, of another shape, or one more than the model has (but
    for ``spare``).
    """
    problems = [f"has nothing for {name}" for name in expected if name not in shapes]
    for name, shape in shapes.items():
        if name not in expected:
            problems += [] if name in spare else [f"{name} is in it, not in the model of the config"]
        elif shape != expected[name]:
            problems.append(f"{name} is {list(shape)} there, {list(expected[name])} by the config")
    return problems[:20]
