"""The config's section ``data``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sffn_dist.spec.config_types import OpenFraction, Section


class Data(Section):
    """Text, tokenizer, token shards."""

    dir: str = Field("data", description="prepared token shards, shared by runs")
    source: str = Field(
        "stdlib",
        description='"stdlib", a file or folder of .txt, .jsonl, .json (also .gz, .zst, .bz2, .xz) and '
        '.parquet, or "hf:<dataset>[:<configuration>]"',
    )
    text_field: str = Field(
        "text", description="column that holds the text, of jsonl, json, parquet and hf sources"
    )
    document_separator: Annotated[str, Field(min_length=1)] | None = Field(
        "<|endoftext|>", description="ends a document inside a .txt file, and is no text; null: none does"
    )
    ignore: tuple[str, ...] = Field((), description="glob patterns of files of a folder that are not read")
    bad_rows: Literal["refuse", "skip"] = Field(
        "refuse", description="what happens to rows that give no text; skipped ones are counted"
    )
    tokenizer: str | None = Field(
        None,
        description="a folder or file: tokenizer.json, tokenizer.model, tiktoken, vocab.json and merges.txt; "
        "default: a byte-level BPE trained on the source",
    )
    end_of_text: str | None = Field(
        None, min_length=1, description="token after each document; default: the tokenizer's eos_token"
    )
    bos: bool = Field(False, description="put the tokenizer's bos_token before each document")
    heldout_share: OpenFraction = Field(0.02, description="of the documents, which evaluations alone read")
