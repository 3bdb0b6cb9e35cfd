"""The config tree by dotted keys: types, values, defaults."""

from __future__ import annotations

from typing import Any

from sffn_dist.spec.config import Config
from sffn_dist.spec.config_types import Section


def key_fields() -> dict[str, Any]:
    """Every dotted key -> its type annotation."""
    annotations: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            annotations.update(
                {f"{name}.{leaf}": item.annotation for leaf, item in section.model_fields.items()}
            )
        else:
            annotations[name] = field.annotation
    return annotations


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat.update({f"{name}.{leaf}": item for leaf, item in value.items()})
        else:
            flat[name] = value
    return flat


def defaults() -> dict[str, Any]:
    """Dotted key -> default, of the keys that have one."""
    values: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            fields = {f"{name}.{leaf}": item for leaf, item in section.model_fields.items()}
        else:
            fields = {name: field}
        values.update(
            {
                key: list(v) if isinstance(v := item.default, tuple) else v
                for key, item in fields.items()
                if not item.is_required()
            }
        )
    return values
