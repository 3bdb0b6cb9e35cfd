"""Checkpoints of the paper authors' code (github.com/CLAIRE-Labo/StructuredFFN), as :class:`Weights`.

Their trainer saves ``<step>.pth``: a dictionary of ``model`` (a state_dict), ``step`` (of the last step
taken, from 0), ``config`` (OmegaConf), the optimiser's and the scheduler's state. Its names against ours, for
a linear of h or f inputs:

    model.wte, lm_head (the same storage where tied)   embedding.word_embeddings, output_layer
    model.layers.i.ln1, ln2; model.ln_f                input_layernorm, pre_mlp_layernorm; final_layernorm
    .qkv_linear    rows [all Q; all K; all V]          rows by key/value head: its queries, its key, its value
    .o_linear, .mlp.fc1, .mlp.fc2                      linear_proj, linear_fc1, linear_fc2; of a gated fc1
                                                       [gate; up] in both
    lr1 (R, N), lr2 (M, R)                             down, up: low_rank
    blkdiag (B, R/B, N/B), lr (M, R)                   block_in, up: block_dense
    blkdiag1 (B, n/B, N/B), blkdiag2 (B, M/B, n/B)     block_in, block_out: block_shuffle, the same shuffle
    guide_linear (M, N), in plain feature order        guide
    count, ratio                                       guided steps taken, alpha of the next one

``ratio`` counts while ``method.kwargs.training.enabled`` does: their code leaves the guide in the model after
its last step, unused. Rotary embeddings turn halves of a head, not pairs; GELU is the tanh form; norms add
1e-5: all as here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffn_dist.checkpoint.weights import Weights
from sffn_dist.conversion import inferred_config, official_config, pickles
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.split_table import is_guide, model_tensors

MODULES = {
    "ln1": "input_layernorm",
    "qkv_linear": "self_attention.linear_qkv",
    "o_linear": "self_attention.linear_proj",
    "ln2": "pre_mlp_layernorm",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
}
TOP = {
    "model.wte": "embedding.word_embeddings",
    "model.ln_f": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "lr1": "down",
    "lr2": "up",
    "lr": "up",
    "blkdiag": "block_in",
    "blkdiag1": "block_in",
    "blkdiag2": "block_out",
    "guide_linear": "guide",
}
# neither weights nor needed: Transformer Engine's records of fp8 scales, and what older code kept of rotary
# embeddings
IDLE = re.compile(r".*\._extra_state|.*\.inv_freq")
BESIDE = ("optimizer", "scheduler", "lr_scheduler", "scaler")  # kept by their trainer beside the model
LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)\.(\w+)")


def read(path: Path, overrides: Sequence[str] = ()) -> Weights:
    """The model in a ``.pth`` of the authors' trainer.

    ``overrides`` (``key=value``) win over what the file states.

    The sizes are read from the tensors. Of a file without its config, ``model.heads`` must be given, and the
    rest of ``model`` where it is not the default. Raises ConfigError if the file is no such checkpoint, or
    its model is one that cannot be built here.
    """
    loaded = pickles.load(path)
    if not isinstance(loaded, dict):
        raise ConfigError(
            [f"{path}: holds a {type(loaded).__name__}, not a dictionary with the model's state"]
        )
    state = loaded["model"] if isinstance(loaded.get("model"), dict) else loaded
    if not state or not all(isinstance(key, str) for key in state):
        raise ConfigError([f"{path}: holds no state_dict"])
    tensors = _tensors(path, state)
    settings = official_config.flat(loaded.get("config"))
    official_config.representable(path, settings, tensors)
    alpha = _alpha(path, state, settings)
    step, tied = _step(loaded), _tied(tensors)
    config = inferred_config.config_of(
        str(path),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        official_config.model(settings, tied=tied),
        overrides,
        train=official_config.train(settings, step),
        guide=official_config.guide(settings) if alpha > 0 else {},
    )
    _check(path, tensors, config, tied=tied, guide=alpha > 0)

    def full(name: str) -> Tensor:
        tensor = pickles.full_precision(tensors[name])
        return _grouped(tensor, config) if ".linear_qkv." in name else tensor

    facts = {
        "format": "CLAIRE-Labo/StructuredFFN",
        "settings": settings,
        "guide_dropped": alpha == 0 and any(map(is_guide, tensors)),
    }
    notices = [f"not imported: {key}" for key in loaded if key in BESIDE and state is not loaded]
    notices += [f"not imported: {key}" for key in state if IDLE.fullmatch(key)]
    if facts["guide_dropped"]:
        notices.append("not imported: the guides, whose time is over (alpha = 0)")
    return Weights(
        config=config,
        full=full,
        origin=str(path),
        guide=alpha > 0,
        alpha=alpha,
        step=step,
        facts=facts,
        notices=tuple(notices),
    )


# --------------------------------------------------------------------------------------- what the file states


def _step(loaded: Mapping[str, Any]) -> int:
    """Steps taken: theirs is the index of the last one."""
    step = loaded.get("step")
    return step + 1 if isinstance(step, int) and 0 <= step < 10_000_000 else 0


def _alpha(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """The guide's weight in the next step; 0 without a guide, or after its time.

    Raises ConfigError if the linears do not agree.
    """
    guides = [key.removesuffix("guide_linear") for key in state if key.endswith(".guide_linear")]
    if not guides or settings.get("method.kwargs.training.enabled") is False:
        return 0.0
    ratios = [state.get(f"{prefix}ratio") for prefix in guides]
    if any(pickles.shape_of(ratio) != () for ratio in ratios):
        raise ConfigError([f"{path}: has guides, but not the ratio of each, which is their weight"])
    values = {float(ratio) for ratio in ratios if ratio is not None}
    if len(values) != 1 or not all(0 <= value <= 1 for value in values):
        raise ConfigError(
            [f"{path}: ratios of the guides are {sorted(values)[:4]}, must be one number between 0 and 1"]
        )
    return values.pop()


def _tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our name -> the tensor as it is. Raises ConfigError naming what is not theirs."""
    tensors: dict[str, Tensor] = {}
    problems = []
    for key, value in state.items():
        theirs = key.removeprefix("module.")
        if IDLE.fullmatch(theirs) or theirs.endswith((".count", ".ratio")):
            continue
        name = _name(theirs)
        if not name:
            problems.append(f"{path}: {key} is not a parameter of the authors' model")
        elif pickles.shape_of(value) is None:
            problems.append(f"{path}: {key} is not a tensor of floating-point numbers")
        else:
            tensors[name] = value
    if inferred_config.TABLE not in tensors:
        problems.append(f"{path}: has no model.wte.weight; not a checkpoint of the authors' code")
    if problems:
        raise ConfigError(problems[:20])
    return tensors


def _name(theirs: str) -> str:
    """Our name; empty if there is none."""
    if theirs == "model.wpe.weight":
        return theirs  # known, and refused with the reason
    module, _, leaf = theirs.rpartition(".")
    if module in TOP and leaf in ("weight", "bias"):
        return f"{TOP[module]}.{leaf}"
    match = LAYER.fullmatch(theirs)
    if (
        match
        and match[2] in MODULES
        and (leaf in ("weight", "bias") or (leaf in LEAVES and match[2].startswith("mlp.")))
    ):
        return f"decoder.layers.{int(match[1])}.{MODULES[match[2]]}.{LEAVES[leaf]}"
    return ""


def _tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the output layer is the embedding: the same storage, or the same numbers, or not there at
    all.
    """
    table, head = tensors[inferred_config.TABLE], tensors.get(inferred_config.OUTPUT)
    return head is None or table.data_ptr() == head.data_ptr() or torch.equal(table, head)


# ------------------------------------------------------------------------------------------------ the tensors


def _check(path: Path, tensors: Mapping[str, Tensor], config: Config, *, tied: bool, guide: bool) -> None:
    """Raises ConfigError with what is missing, wrong or too much for the model of this config."""
    expected = {name: spec.shape for name, spec in model_tensors(config, guide=guide).items()}
    spare = {name for name in tensors if is_guide(name) and not guide}  # after its time
    if config.model.tie_embeddings:
        spare.add(inferred_config.OUTPUT)
    problems = inferred_config.mismatches(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, spare=frozenset(spare)
    )
    if config.model.tie_embeddings and not tied:
        problems.append("lm_head.weight is not model.wte.weight, so that model.tie_embeddings must be false")
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])


def _grouped(tensor: Tensor, config: Config) -> Tensor:
    """Rows [all queries; all keys; all values] -> by key/value head [its queries; its key; its value].

    Of a bias, its elements.
    """
    groups, size, tail = config.kv_heads, config.head_dim, tensor.shape[1:]
    parts = tensor.split([config.attention_dim, groups * size, groups * size])
    return torch.cat(
        [part.view(groups, math.prod(part.shape[:1]) // groups, *tail) for part in parts], dim=1
    ).reshape(tensor.shape)
