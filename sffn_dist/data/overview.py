"""What a run reads, for the plan and the log: files, tokens, passes. Opens no file of the source."""

from __future__ import annotations

from typing import Any

from sffn_dist.data import metadata
from sffn_dist.data.sources import source_of
from sffn_dist.spec import schedule
from sffn_dist.spec.config import Config

# passes up to which repeated data is nearly as good as new (Muennighoff et al. 2023, arXiv 2305.16264)
NEARLY_NEW = 4.0


def overview(config: Config) -> dict[str, Any]:
    """One JSON-ready object: the prepared folder, tokens and ``epochs``, passes over the training data.

    Tokens and epochs are None where the corpus is not prepared yet. Raises ConfigError as metadata.locate.
    """
    folder = metadata.locate(config)
    meta = metadata.read_meta(folder) if metadata.is_usable(folder) else None
    steps = schedule.build_schedule(config).total_steps
    return {
        "source": config.data.source,
        "contents": source_of(config.data.source).contents(config.data),
        "folder": str(folder),
        "train_tokens": meta.train.tokens if meta else None,
        "heldout_tokens": meta.heldout.tokens if meta else None,
        "skipped": meta.skipped.model_dump() if meta else None,
        "epochs": schedule.epochs(config, meta.train.tokens, steps) if meta else None,
    }


def epochs_line(config: Config, train_tokens: int) -> str:
    """How often a run passes over its training data."""
    steps = schedule.build_schedule(config).total_steps
    epochs = schedule.epochs(config, train_tokens, steps)
    line = f"data: {train_tokens:,} tokens to train on; {steps:,} steps pass over them {epochs:.3g} times"
    if epochs > NEARLY_NEW:
        return f"warning: {line}; more than {NEARLY_NEW:.0f} passes teach a model little that is new"
    return line
