"""The config tree of a model that the paper authors' code saved: sizes from its tensors, the rest from its pickled OmegaConf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffn_dist import reading
from sffn_dist.checkpoint import pickles
from sffn_dist.config import Config, ConfigError

Tensors = Mapping[str, tuple[str, Tensor]]  # our name -> (the last part of theirs, the tensor)
KINDS = {"weight": "dense", "lr1": "low_rank", "blkdiag": "block_dense", "blkdiag1": "block_shuffle"}
# their settings -> ours, where they are numbers that ours can take; the recipe is worth keeping, but no model hangs on it
RECIPE = {
    "optimization.global_batch_size": "global_batch_size",
    "data.train.train_batch": "micro_batch_size",
    "optimization.seed": "seed",
    "optimization.optimizer.kwargs.lr": "learning_rate",
    "optimization.optimizer.kwargs.weight_decay": "weight_decay",
    "optimization.lr_scheduler.kwargs.warmup_iter": "warmup_share",
    "optimization.gradient_clipping": "clip",
}


def flat(node: object, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of OmegaConf's pickled nodes, or of plain dictionaries; interpolations as the text that they are."""
    inner = pickles.attributes(node) if isinstance(node, pickles.StandIn) else {}
    if "_content" in inner:
        node = inner["_content"]
    elif "_val" in inner:
        node = inner["_val"]
    if isinstance(node, dict):
        found: dict[str, Any] = {}
        for key, value in dict.items(node):
            if len(prefix) < 200:  # a node can hold itself
                found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
        return found
    if isinstance(node, list):
        return {prefix: [next(iter(flat(item, "item").values()), None) for item in node[:8]]} if len(prefix) < 200 else {}
    return {prefix: node} if isinstance(node, str | int | float | bool | None) else {}


def representable(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raises ConfigError with everything about the model that has no counterpart here."""
    model = "model.kwargs."
    problems = []
    if settings.get(f"{model}pos_emb.name", "rope") != "rope" or "model.wpe.weight" in tensors:
        problems.append("learned positions (pos_emb.name = absolute); models here have rotary embeddings")
    if settings.get(f"{model}pos_emb.rotary_interleaved"):
        problems.append("pos_emb.rotary_interleaved; rotary embeddings here turn halves of a head")
    if settings.get(f"{model}pos_emb.seq_len_interpolation_factor") not in (None, 1, 1.0):
        problems.append("pos_emb.seq_len_interpolation_factor; positions here are not scaled")
    if settings.get(f"{model}scale_attn_by_inverse_layer_idx"):
        problems.append("scale_attn_by_inverse_layer_idx; attention here is scaled alike in every layer")
    if settings.get(f"{model}act", "gelu") not in ("gelu", "swiglu"):
        problems.append(f"act = {settings[f'{model}act']!r}; must be gelu or swiglu")
    if problems:
        raise ConfigError([f"{path}: the model has {problem}" for problem in problems])


def config_of(
    path: Path,
    tensors: Tensors,
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    step: int,
    alpha: float,
) -> Config:
    """The whole config: sizes by the tensors, the rest by their settings, above both what is given."""
    given: dict[str, Any] = {}
    reading.override(given, overrides)
    kwargs = {key.removeprefix("model.kwargs."): value for key, value in settings.items() if key.startswith("model.kwargs.")}
    heads = given.get("model", {}).get("heads") or kwargs.get("num_q_heads")
    if not isinstance(heads, int) or heads < 1:
        raise ConfigError([f"{path}: does not say how many heads attention has; give it as model.heads=..."])
    try:
        tree: dict[str, Any] = {
            "model": _model(tensors, kwargs, heads),
            "ffn": _ffn(tensors),
            "train": _recipe(settings, step),
            "guide": _guide(settings) if alpha > 0 else {},
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ConfigError([f"{path}: not a whole model of the authors' code: {type(error).__name__}: {error}"]) from None
    reading.override(tree, overrides)
    return reading.from_tree(tree)


def _model(tensors: Tensors, kwargs: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """The config's section; raises KeyError for a tensor that is not there."""
    first = "decoder.layers.0."
    vocab, width = _shape(tensors, "embedding.word_embeddings.weight")
    attention = _shape(tensors, f"{first}self_attention.linear_proj.weight")[1]
    rows = _shape(tensors, f"{first}self_attention.linear_qkv.weight")[0]
    wide, inner = _features(tensors, f"{first}mlp.linear_fc1")[0], _features(tensors, f"{first}mlp.linear_fc2")[1]
    model = {
        "layers": 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")),
        "width": width,
        "heads": heads,
        "kv_heads": (rows - attention) // 2 * heads // attention,
        "attention_dim": attention,
        "vocab": vocab,
        "norm": "layernorm" if "decoder.final_layernorm.bias" in tensors else "rmsnorm",
        "norm_epsilon": 1e-5,
        "activation": "swiglu" if wide == 2 * inner else "gelu",
        "bias": f"{first}self_attention.linear_qkv.bias" in tensors,
        "tie_embeddings": kwargs["tie_word_embeddings"] if "tie_word_embeddings" in kwargs else tied(tensors),
    }
    # what no tensor tells; without a config the defaults here, which are the values in all of theirs
    plain = {"sequence": "max_position_embeddings", "rope_base": "pos_emb.rotary_base"}
    return model | {ours: kwargs[theirs] for ours, theirs in plain.items() if theirs in kwargs}


def _shape(tensors: Tensors, name: str) -> torch.Size:
    return tensors[name][1].shape


def _features(tensors: Tensors, linear: str) -> tuple[int, int]:
    """(Outputs, inputs) of a feed-forward linear of any kind; raises KeyError for a factor that is not there."""
    shapes = {
        name.removeprefix(f"{linear}."): value.shape for name, (_, value) in tensors.items() if name.startswith(f"{linear}.")
    }
    first = shapes.get("weight") or shapes.get("down") or shapes["block_in"]
    last = shapes.get("weight") or shapes.get("up") or shapes["block_out"]
    return (last[0] if len(last) == 2 else last[0] * last[1]), (first[1] if len(first) == 2 else first[0] * first[2])


def tied(tensors: Tensors) -> bool:
    """Whether the output layer is the embedding: the same storage, or the same numbers, or not there at all."""
    table, head = (tensors.get(name) for name in ("embedding.word_embeddings.weight", "output_layer.weight"))
    if table is None or head is None:
        return True
    return table[1].data_ptr() == head[1].data_ptr() or torch.equal(table[1], head[1])


def _ffn(tensors: Tensors) -> dict[str, Any]:
    """Kind, rank and blocks, and which layers stayed dense: those with a plain weight."""
    kinds = {
        int(name.split(".")[2]): (KINDS[leaf], value.shape)
        for name, (leaf, value) in tensors.items()
        if ".mlp.linear_fc1." in name and leaf in KINDS
    }
    structured = {kind for kind, _ in kinds.values()} - {"dense"}
    if len(structured) > 1:
        raise ValueError(f"layers of kinds {sorted(structured)} in one model")
    kind = next(iter(structured), "dense")
    ffn: dict[str, Any] = {"kind": kind, "width": _features(tensors, "decoder.layers.0.mlp.linear_fc2")[1]}
    ffn["dense_layers"] = sorted(layer for layer, (its, _) in kinds.items() if its == "dense") if structured else [0]
    shape = next(shape for its, shape in kinds.values() if its == kind)
    if kind == "low_rank":
        ffn["rank"] = shape[0]
    elif kind == "block_dense":
        ffn |= {"blocks": shape[0], "rank": shape[0] * shape[1]}
    elif kind == "block_shuffle":
        ffn["blocks"] = shape[0]
    return ffn


def _recipe(settings: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The config's train section: theirs where it is plain numbers, else the defaults here."""
    train: dict[str, Any] = {}
    for theirs, ours in RECIPE.items():
        value = settings.get(theirs)
        if isinstance(value, int | float) and 0 <= value < 2**53 and (value > 0 or ours in ("seed", "clip", "weight_decay")):
            train[ours] = float(value) if ours in ("clip", "weight_decay", "learning_rate", "warmup_share") else value
    betas = settings.get("optimization.optimizer.kwargs.betas")
    if isinstance(betas, list) and len(betas) == 2 and all(isinstance(beta, float) and 0 < beta < 1 for beta in betas):
        train |= {"beta1": betas[0], "beta2": betas[1]}
    total = settings.get("optimization.lr_scheduler.kwargs.T_max")
    if settings.get("optimization.training.kwargs.mode") == "fixedflop" and isinstance(total, int):
        total -= _guided_steps(settings)  # repeated at the end
    train["steps"] = total if isinstance(total, int) and total > 0 else max(step, 1)
    if train.get("global_batch_size", 0) % train.get("micro_batch_size", 1):
        train = {key: value for key, value in train.items() if not key.endswith("batch_size")}
    return train


def _guided_steps(settings: Mapping[str, Any]) -> int:
    steps = settings.get("method.kwargs.training.max_step")
    return steps if isinstance(steps, int) and steps > 0 else 0


def _guide(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config's guide section, such that alpha falls over the very steps that it does there."""
    if not _guided_steps(settings):
        return {"mode": "fixed_step", "share": 1.0}
    form = settings.get("method.kwargs.training.scheduler")
    return {
        "mode": "window",
        "end": _guided_steps(settings),
        "alpha": form if form in ("cosine", "linear") else "cosine",
        "stochastic": settings.get("method.kwargs.training.reduce_flop") is True,
    }
