"""What the paper authors' pickled OmegaConf holds of a model and how it was trained, in the terms of the
config here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sffn_dist.conversion import inferred_config, pickles
from sffn_dist.spec.config import ConfigError

RECIPE = {
    "optimization.global_batch_size": "global_batch_size",
    "data.train.train_batch": "micro_batch_size",
    "optimization.seed": "seed",
    "optimization.optimizer.kwargs.lr": "learning_rate",
    "optimization.optimizer.kwargs.weight_decay": "weight_decay",
    "optimization.optimizer.kwargs.betas.0": "beta1",
    "optimization.optimizer.kwargs.betas.1": "beta2",
    "optimization.lr_scheduler.kwargs.warmup_iter": "warmup_share",
    "optimization.gradient_clipping": "clip",
}
MODEL = "model.kwargs."
GUIDE = "method.kwargs.training."


def flat(node: object, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of OmegaConf's pickled nodes, or of plain dictionaries and lists.

    Interpolations as the text that they are.
    """
    inner = pickles.attributes(node) if isinstance(node, pickles.StandIn) else {}
    node = inner.get("_content", inner.get("_val")) if inner else node
    if len(prefix) > 200:  # a node can hold itself
        return {}
    if isinstance(node, dict | list):
        items = list(dict.items(node)) if isinstance(node, dict) else list(enumerate(node))
        return {
            name: leaf
            for key, value in items
            for name, leaf in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: node} if isinstance(node, str | int | float | bool | None) else {}


def representable(path: Path, settings: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Raises ConfigError with everything about the model that has no counterpart here."""
    model_settings = {
        key.removeprefix(MODEL): value for key, value in settings.items() if key.startswith(MODEL)
    }
    problems = []
    if model_settings.get("pos_emb.name", "rope") != "rope" or "model.wpe.weight" in names:
        problems.append("learned positions (pos_emb.name = absolute); models here have rotary embeddings")
    if model_settings.get("pos_emb.rotary_interleaved"):
        problems.append("pos_emb.rotary_interleaved; rotary embeddings here turn halves of a head")
    if model_settings.get("pos_emb.seq_len_interpolation_factor") not in (None, 1, 1.0):
        problems.append("pos_emb.seq_len_interpolation_factor; positions here are not scaled")
    if model_settings.get("scale_attn_by_inverse_layer_idx"):
        problems.append("scale_attn_by_inverse_layer_idx; attention here is scaled alike in every layer")
    if model_settings.get("act", "gelu") not in ("gelu", "swiglu"):
        problems.append(f"act = {model_settings['act']!r}; must be gelu or swiglu")
    if problems:
        raise ConfigError([f"{path}: the model has {problem}" for problem in problems])


def model(settings: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Settings of the model section that no shape shows.

    Without their config the defaults here, which are the values in all of theirs.
    """
    names = {
        "heads": "num_q_heads",
        "sequence": "max_position_embeddings",
        "rope_base": "pos_emb.rotary_base",
    }
    model_settings = {
        ours: settings[MODEL + theirs] for ours, theirs in names.items() if MODEL + theirs in settings
    }
    return {
        **model_settings,
        "norm_epsilon": 1e-5,
        "tie_embeddings": settings.get(f"{MODEL}tie_word_embeddings", tied),
    }


def train(settings: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The train section."""
    total = settings.get("optimization.lr_scheduler.kwargs.T_max")
    if isinstance(total, int) and settings.get("optimization.training.kwargs.mode") == "fixedflop":
        total -= guided_steps(settings)  # repeated at the end
    steps = total if isinstance(total, int) and total > 0 else max(step, 1)
    return {**inferred_config.recipe(settings, RECIPE), "steps": steps}


def guided_steps(settings: Mapping[str, Any]) -> int:
    """Steps with a guide, from the first on; 0 if none are set."""
    steps = settings.get(f"{GUIDE}max_step")
    return steps if isinstance(steps, int) and steps > 0 else 0


def guide(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The guide section, such that alpha falls over the very steps that it does there."""
    if not guided_steps(settings):
        return {"mode": "fixed_step", "fraction": 1.0}
    form = settings.get(f"{GUIDE}scheduler")
    return {
        "mode": "window",
        "end": guided_steps(settings),
        "schedule": form if form in ("cosine", "linear") else "cosine",
        "stochastic": settings.get(f"{GUIDE}reduce_flop") is True,
    }
