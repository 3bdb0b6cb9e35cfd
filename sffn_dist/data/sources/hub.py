"""``hf:<dataset>`` or ``hf:<dataset>:<configuration>``: split ``train`` of a dataset of the hub, column
``data.text_field``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sffn_dist.data.sources.base import BATCH_BYTES, ROWS, Item, Source, missing_column_error, row_item
from sffn_dist.spec.config import Data

PREFIX = "hf:"


def name_and_configuration(source: str) -> tuple[str, str | None]:
    """``hf:<dataset>`` or ``hf:<dataset>:<configuration>`` -> name, configuration."""
    name, _, configuration = source.removeprefix(PREFIX).partition(":")
    return name.strip(), configuration.strip() or None


class Hub(Source):
    """Downloaded once by datasets and read from its memory-mapped copy.

    Identified by its name: a dataset that changes on the hub is not noticed.
    """

    form = '"hf:<dataset>[:<configuration>]"'

    def matches(self, source: str) -> bool:
        return source.startswith(PREFIX)

    def problem(self, data: Data) -> str | None:
        return None if name_and_configuration(data.source)[0] else "the dataset's name is missing"

    def identity(self, data: Data) -> dict[str, Any]:
        identity = {"hf": name_and_configuration(data.source), "text_field": data.text_field}
        return identity if data.bad_rows == "refuse" else {**identity, "bad_rows": data.bad_rows}

    def label(self, data: Data) -> str:
        return name_and_configuration(data.source)[0]

    def documents(self, data: Data) -> Iterator[Item]:
        import datasets

        name, configuration = name_and_configuration(data.source)
        rows = datasets.load_dataset(name, configuration, split="train")
        if data.text_field not in rows.column_names:
            raise missing_column_error(data, rows.column_names, data.source)
        texts, number = rows.select_columns([data.text_field]), 0
        # rows of many bytes are read fewer at a time
        row_bytes = texts.data.nbytes // max(1, len(texts))
        size = max(1, min(ROWS, BATCH_BYTES // max(1, row_bytes)))
        for batch in texts.iter(batch_size=size):
            for value in batch[data.text_field]:
                number += 1
                yield row_item(data, {data.text_field: value}, f"row {number} of {data.source}")
