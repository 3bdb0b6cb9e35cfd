"""Where a prepared corpus lies and what it is, without opening it.

A prepared corpus is one folder in ``data.dir``::

    <readable key>-<hash>/    tokenizer.json   token_bytes.npy   meta.json
                              train-00000.bin ...   heldout-00000.bin ...   heldout_bytes-00000.bin ...
                              tokenizer_config.json   generation_config.json

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
from sffn_dist.data import tokenizer_files
from sffn_dist.data.sources import forms, source_of
from sffn_dist.data.sources.base import digest
from sffn_dist.spec.config import Config, ConfigError, Data

# of the prepared folder: raise it whenever the same source and settings would give other files
FORMAT: Final = 1
# source bytes of each held-out token, little-endian, in files as the tokens'
HELDOUT_BYTES, BYTES_TYPE, BYTES_SIZE = "heldout_bytes", "<u4", 4
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
    setting = f"data.tokenizer = {json.dumps(data.tokenizer)}: must be {tokenizer_files.FORMS}"
    path = Path(data.tokenizer).expanduser()
    if not path.exists():
        return f"{setting}; there is no such file or folder"
    files = tokenizer_files.find(path)
    if files is None:
        return f"{setting}; this folder holds none, or several"
    if not all(os.access(file, os.R_OK) for file in files.tokens):
        return f"{setting}; it cannot be read (permissions)"
    return None


# --------------------------------------------------------------------------------------------------- locating


def locate(config: Config) -> Path:
    """The folder in which the corpus of ``config`` is, or will be, prepared.

    Costs a listing of the source's files and a hash of the tokenizer file; reads no text. A dataset of the
    hub is known by its name only: what it holds is settled when it is first prepared.

    Raises:
        ConfigError: bad ``data.source``, ``data.tokenizer`` or ``model.vocab``.
    """
    check_source(config.data, config.model.vocab)
    try:
        return _folder(config, _tokenizer_identity(config.data))
    except ConfigError:
        # an earlier version took the first of its own list for the end of text, whatever the files say
        folder = _folder(config, {"tokenizer": _tokens_hash(config.data)})
        if config.data.end_of_text is None and not config.data.bos and is_usable(folder):
            return folder
        raise


def _folder(config: Config, tokenizer: dict[str, Any]) -> Path:
    source = source_of(config.data.source)
    identity = {
        "format": FORMAT,
        "source": source.identity(config.data),
        **tokenizer,
        "vocab": config.model.vocab,
        "heldout_share": config.data.heldout_share,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9_]+", "-", source.label(config.data)).strip("-")[:40] or "corpus"
    return Path(config.data.dir).expanduser() / f"{label}-v{config.model.vocab}-{key}"


def _tokens_hash(data: Data) -> str | None:
    """Of the file, or files, that hold the tokens of ``data.tokenizer``."""
    if data.tokenizer is None:
        return None
    hashes = [hash_file(file) for file in tokenizer_files.named(data).tokens]
    return hashes[0] if len(hashes) == 1 else digest(hashes)


def _tokenizer_identity(data: Data) -> dict[str, Any]:
    """What decides ids and what is put around documents; raises ConfigError as tokenizer_files.end_of_text.

    A key is there only where its value is not what earlier versions did, whose folders keep their names.
    """
    tree: dict[str, Any] = {"tokenizer": _tokens_hash(data)}
    if data.tokenizer is None:
        return tree | ({"end_of_text": data.end_of_text} if data.end_of_text else {})
    files = tokenizer_files.named(data)
    found = tokenizer_files.settings(files.folder)
    if not files.is_json:  # its tokens are known once it is converted
        added = found.tokenizer.get("added_tokens_decoder")
        return tree | {"end_of_text": [data.end_of_text, found.ends], "bos": data.bos, "added": added}
    try:
        text = files.tokens[0].read_text(encoding="utf-8")
        whole = tokenizer_files.with_added_tokens(text, found.tokenizer)
        ids = tokenizer_files.vocabulary(whole)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        setting = f"data.tokenizer = {json.dumps(data.tokenizer)}"
        kind = type(error).__name__
        raise ConfigError([f"{setting}: must be {tokenizer_files.FORMS}: {kind}: {error}"]) from None
    end = tokenizer_files.end_of_text(data, found, ids)
    if end != next((token for token in tokenizer_files.EARLIER_SEPARATORS if token in ids), None):
        tree["end_of_text"] = end
    if (begin := tokenizer_files.beginning_of_text(data, found, ids)) is not None:
        tree["bos"] = begin
    return tree | ({} if whole == text else {"added": found.tokenizer["added_tokens_decoder"]})


# -------------------------------------------------------------------------------------------------- meta.json

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One file of tokens of a split."""

    file: Annotated[str, Field(pattern=r"^(train|heldout|heldout_bytes)-\d{5}\.bin$")]
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
    bos: Count | None = None  # id put before each document
    dtype: Literal["uint16", "uint32"]
    heldout_share: float
    byte_exact: Annotated[
        bool, Field(description="token_bytes.npy gives bytes of text exactly, not as an estimate")
    ]
    # source bytes of each held-out token; none where byte_exact, or by an earlier version
    heldout_bytes: tuple[Shard, ...] = ()
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
    sizes |= {shard.file: shard.tokens * BYTES_SIZE for shard in meta.heldout_bytes}
    if meta.heldout_bytes and meta.heldout.tokens != sum(shard.tokens for shard in meta.heldout_bytes):
        raise CorpusError(f"{folder}: meta.json is damaged: its token counts do not add up")
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
