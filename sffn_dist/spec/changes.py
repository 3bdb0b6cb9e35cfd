"""Settings that a run was given anew on the way (``pretrain.py --change``), as part of its config.

``Config.changes`` lists (step, the values until then), oldest first; the config itself has the newest values.
So every function of a config, the schedule above all, knows which settings a step had. Standard library only.
"""

from __future__ import annotations

import json
from typing import Any

from sffn_dist.spec.config import Change, Config, Guide
from sffn_dist.spec.config_keys import flatten

# All else that makes a run what it is decides the meaning of its weights, moments or batches so far.
CHANGEABLE = frozenset(
    {
        "train.steps",
        "train.learning_rate",
        "train.learning_rate_schedule",
        "train.min_learning_rate_ratio",
        "train.warmup_share",
        "train.weight_decay",
        "train.beta1",
        "train.beta2",
        "train.epsilon",
        "train.clip",
        *(f"guide.{key}" for key in Guide.model_fields),
    }
)


def history(config: Config) -> list[tuple[int, Config]]:
    """(first step, settings from there on), oldest first; the last is the config itself."""
    ends = [change.step for change in config.changes]
    configs = [config]
    for change in reversed(config.changes):
        configs.insert(0, with_values(configs[0], change.before))
    return list(zip([0, *ends], configs, strict=True))


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The config with other values of some dotted keys, not validated against one another."""
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[leaf] = value
    return Config.model_validate_json(json.dumps(tree))


def described(config: Config) -> list[tuple[int, str]]:
    """(step, sentence) of each change."""
    settings = [flatten(config_then) for _, config_then in history(config)]
    return [
        (change.step, _sentence(change, after))
        for change, after in zip(config.changes, settings[1:], strict=True)
    ]


def _sentence(change: Change, after: dict[str, Any]) -> str:
    pairs = (f"{key} {json.dumps(value)} -> {json.dumps(after[key])}" for key, value in change.before.items())
    return f"from step {change.step} on: {', '.join(pairs)}"
