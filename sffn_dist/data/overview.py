"""What a run reads, for the plan and the log: files, tokens, passes. Opens no file of the source."""

from __future__ import annotations

import math
from typing import Any

from sffn_dist.data import meta_file, metadata
from sffn_dist.data.sources import source_of
from sffn_dist.spec import loading, schedule
from sffn_dist.spec.config import Config, ConfigError

# passes up to which repeated data is nearly as good as new (Muennighoff et al. 2023, arXiv 2305.16264)
NEARLY_NEW = 4.0


def overview(config: Config) -> dict[str, Any]:
    """One JSON-ready object: the prepared folder, tokens and ``epochs``, passes over the training data.

    Tokens and epochs are None where the corpus is not prepared yet. Raises ConfigError as metadata.locate.
    """
    folder = metadata.locate(config)
    meta = meta_file.read_meta(folder) if meta_file.is_usable(folder) else None
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


def resolve_prepared(config: Config) -> Config:
    """:func:`resolve_epochs` where the corpus is prepared already; else the config as it is."""
    if config.train.steps:
        return config
    folder = metadata.locate(config)
    if not meta_file.is_usable(folder):
        return config
    return resolve_epochs(config, meta_file.read_meta(folder).train.tokens)


def resolve_epochs(config: Config, train_tokens: int) -> Config:
    """The config with ``train.steps`` in place of ``train.epochs``, which the rest of a run knows nothing of.

    Raises ConfigError with what is wrong once the steps are known, or where the data hold no sample.
    """
    if config.train.steps:
        return config
    passed_over = schedule.epochs(config, train_tokens, 1)  # by one step
    if not passed_over or config.train.epochs is None:
        rule = f"must be below the number of training tokens of data.source, {train_tokens}"
        raise ConfigError([f"model.sequence = {config.model.sequence}: {rule}"])
    steps = max(1, math.ceil(config.train.epochs / passed_over - 1e-6))
    tree = config.model_dump(mode="json")
    tree["train"] |= {"steps": steps, "epochs": None}
    return loading.from_tree(tree)


def epochs_line(config: Config, train_tokens: int) -> str:
    """How often a run passes over its training data."""
    steps = schedule.build_schedule(config).total_steps
    epochs = schedule.epochs(config, train_tokens, steps)
    line = f"data: {train_tokens:,} tokens to train on; {steps:,} steps pass over them {epochs:.3g} times"
    if epochs > NEARLY_NEW:
        return f"warning: {line}; more than {NEARLY_NEW:.0f} passes teach a model little that is new"
    return line
