"""Config keys that had another name in earlier versions. Standard library only.

A config file or an override that uses an old name is refused, naming the new one. What earlier versions
recorded (run.json, manifests, start.json of an import) keeps its names on disk and is translated when it is
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# old dotted key -> new dotted key
RENAMED = {
    "guide.alpha": "guide.schedule",
    "guide.share": "guide.fraction",
    "guards.rollbacks": "guards.max_rollbacks",
}
# a text for init_from is still good in a config file
SHORT_FORMS = {"init_from": "init_from.path"}
RENAMED_IN_RECORDS = RENAMED | SHORT_FORMS


def translate_flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of a record, with today's names."""
    return {RENAMED_IN_RECORDS.get(key, key): value for key, value in settings.items()}


def translate(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config tree, with today's names; what is no section is left as it is."""
    translated: dict[str, Any] = {}
    for section, settings in tree.items():
        if isinstance(settings, Mapping):
            prefix = f"{section}."
            settings = {
                RENAMED.get(prefix + key, prefix + key).removeprefix(prefix): value
                for key, value in settings.items()
            }
        translated[section] = settings
    return translated
