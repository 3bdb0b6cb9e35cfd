"""Where a prepared corpus lies and what it is, without opening it.

A prepared corpus is one folder in ``data.dir``::

    <readable key>-<hash>/    tokenizer.json   token_bytes.npy   meta.json
                              train-00000.bin ...   heldout-00000.bin ...

The hash covers all that decides the content, so a changed source, tokenizer or setting means another folder
and an existing folder never changes. This module answers "which folder?" and "is it whole?"; it imports
neither numpy nor datasets nor tokenizers, because a run is identified and bad input refused before anything
heavy is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sffn_dist.atomic_io import hash_file
from sffn_dist.data.sources import forms, source_of
from sffn_dist.data.sources.base import digest
from sffn_dist.spec.config import Config, ConfigError, Data

# of the prepared folder: raise it whenever the same source and settings would give other files
FORMAT: Final = 1
SMALLEST_VOCAB = 257  # 256 bytes and the end-of-text token


class CorpusError(RuntimeError):
    """A prepared folder cannot be used; the message states which and why."""


# --------------------------------------------------------------------------------------------------- checking


def check_source(data: Data, vocab: int | None = None) -> None:
    """The cheap check of ``data.source`` and ``data.tokenizer`` (and that ``model.vocab`` has room for all
    bytes).

    Raises:
        ConfigError: with every problem found.
    """
    problems = [text for text in (_source_problem(data), _tokenizer_problem(data)) if text]
    if vocab is not None and data.tokenizer is None and vocab < SMALLEST_VOCAB:
        problems.append(
            f"model.vocab = {vocab}: must be at least {SMALLEST_VOCAB} (256 bytes and the end-of-text "
            f"token), or name a data.tokenizer"
        )
    if problems:
        raise ConfigError(problems)


def _source_problem(data: Data) -> str | None:
    problem = source_of(data.source).problem(data)
    return f"data.source = {json.dumps(data.source)}: must be {forms()}; {problem}" if problem else None


def _tokenizer_problem(data: Data) -> str | None:
    if data.tokenizer is None:
        return None
    path, setting = Path(data.tokenizer).expanduser(), f"data.tokenizer = {json.dumps(data.tokenizer)}"
    if not path.is_file():
        return f"{setting}: must be the path of a tokenizer.json; there is no such file"
    if not os.access(path, os.R_OK):
        return f"{setting}: must be the path of a tokenizer.json; it cannot be read (permissions)"
    return None


# --------------------------------------------------------------------------------------------------- locating


def locate(config: Config) -> Path:
    """The folder in which the corpus of ``config`` is, or will be, prepared.

    Costs a listing of the source's files and a hash of the tokenizer file; reads no text. A dataset of the
    hub is known by its name only: what it holds is settled when it is first prepared.

    Raises:
        ConfigError: bad ``data.source``, ``data.tokenizer`` or ``model.vocab``.
    """
    check_source(config.data, config.vocab_unpadded)
    source = source_of(config.data.source)
    identity = {
        "format": FORMAT,
        "source": source.identity(config.data),
        "tokenizer": hash_file(Path(config.data.tokenizer).expanduser()) if config.data.tokenizer else None,
        "vocab": config.vocab_unpadded,
        "heldout_share": config.data.heldout_share,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9_]+", "-", source.label(config.data)).strip("-")[:40] or "corpus"
    return Path(config.data.dir).expanduser() / f"{label}-v{config.vocab_unpadded}-{key}"


# -------------------------------------------------------------------------------------------------- meta.json

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One file of tokens of a split."""

    file: Annotated[str, Field(pattern=r"^(train|heldout)-\d{5}\.bin$")]
    tokens: Annotated[int, Field(gt=0)]
    sha256: Digest


class Split(_Record):
    """One side of the corpus; ``bytes`` are UTF-8 bytes of text, the separators count none."""

    documents: Count
    tokens: Annotated[int, Field(gt=0)]
    bytes: Count
    shards: tuple[Shard, ...]


class Meta(_Record):
    """What meta.json holds.

    ``unigram_entropy`` is in nats a token: the held-out tokens under their own frequencies.
    """

    format: Literal[1]
    name: str
    fingerprint: Digest
    source: str
    tokenizer: str
    tokenizer_sha256: Digest
    vocab: Annotated[int, Field(gt=0, le=2**32, description="highest token id + 1")]
    end_of_text: Count
    dtype: Literal["uint16", "uint32"]
    heldout_share: float
    byte_exact: Annotated[
        bool, Field(description="token_bytes.npy gives bytes of text exactly, not as an estimate")
    ]
    unigram_entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    train: Split
    heldout: Split
    versions: dict[str, str]

    @property
    def token_size(self) -> int:
        """Bytes of one stored token."""
        return 2 if self.dtype == "uint16" else 4


def fingerprint(tokenizer_sha256: str, train: tuple[Shard, ...], heldout: tuple[Shard, ...]) -> str:
    """sha256 over the tokenizer's and the shards' sha256: equal if and only if tokens and tokenizer are."""
    rows = [tokenizer_sha256, [shard.sha256 for shard in train], [shard.sha256 for shard in heldout]]
    return digest(rows)


def dump_meta(meta: Meta) -> str:
    """The text of meta.json: the record and a checksum of it, so that no changed digit passes for the
    truth.
    """
    record = meta.model_dump(mode="json")
    return json.dumps({"meta": record, "checksum": _checksum(record)}, indent=1) + "\n"


def _checksum(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_meta(folder: str | os.PathLike[str]) -> Meta:
    """Read and check ``folder/meta.json``, and that every file it names is there at its full size.

    Raises:
        CorpusError: nothing prepared there, or not whole.
    """
    folder = Path(folder)
    try:
        tree = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if (
            not isinstance(tree, dict)
            or set(tree) != {"meta", "checksum"}
            or tree["checksum"] != _checksum(tree["meta"])
        ):
            raise CorpusError(f"{folder}: meta.json is damaged (its checksum does not fit)")
        meta = Meta.model_validate_json(json.dumps(tree["meta"]))
    except FileNotFoundError:
        raise CorpusError(f"{folder}: holds no prepared corpus (no meta.json)") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CorpusError(
            f"{folder}: meta.json is not of this format: {first['loc']}: {first['msg']}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{folder}: meta.json is damaged: {error}") from None
    _check_files(folder, meta)
    return meta


def _check_files(folder: Path, meta: Meta) -> None:
    for split in (meta.train, meta.heldout):
        if split.tokens != sum(shard.tokens for shard in split.shards):
            raise CorpusError(f"{folder}: meta.json is damaged: its token counts do not add up")
    if not math.isfinite(meta.heldout_share) or meta.end_of_text >= meta.vocab:
        raise CorpusError(f"{folder}: meta.json is damaged: its values contradict each other")
    sizes = {
        shard.file: shard.tokens * meta.token_size
        for split in (meta.train, meta.heldout)
        for shard in split.shards
    }
    for name, size in {**sizes, "tokenizer.json": None, "token_bytes.npy": None}.items():
        try:
            actual_size = (folder / name).stat().st_size
        except OSError as error:
            raise CorpusError(f"{folder}: {name} is missing: {error.strerror}") from None
        if actual_size != size and size is not None:
            raise CorpusError(f"{folder}: {name} holds {actual_size} bytes, must hold {size}")


def is_usable(folder: str | os.PathLike[str]) -> bool:
    """True if :func:`read_meta` accepts the folder."""
    try:
        read_meta(folder)
    except CorpusError:
        return False
    return True
