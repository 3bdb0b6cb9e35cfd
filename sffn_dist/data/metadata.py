"""Where a prepared corpus lies and what it is, without opening it.

A prepared corpus is one folder in ``data.dir``::

    <readable key>-<hash>/    tokenizer.json   token_bytes.npy   meta.json
                              train-00000.bin ...   heldout-00000.bin ...   heldout_bytes-00000.bin ...
                              tokenizer_config.json   generation_config.json

The hash covers all that decides the content, so a changed source, tokenizer or setting means another folder
and an existing folder never changes. This module answers "which folder?" and "is it whole?", without numpy,
datasets and tokenizers: bad input is refused before anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sffn_dist.data import tokenizer_files
from sffn_dist.data.content import content_digest, names_digest, remember, remembered
from sffn_dist.data.sources import forms, source_of
from sffn_dist.data.sources.base import digest
from sffn_dist.data.sources.files import SourceFile
from sffn_dist.spec.config import Config, ConfigError, Data
from sffn_dist.spec.disk_errors import explained

log = logging.getLogger(__name__)

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
    problems = [text for text in (_source_problem(data), tokenizer_files.problem(data)) if text]
    if problems and vocab is not None and len(prepared := without_source(data, vocab)) == 1:
        log.info("%s: not there; %s, which was prepared from it, suffices", data.source, prepared[0])
        return
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


# --------------------------------------------------------------------------------------------------- locating


def locate(config: Config) -> Path:
    """The folder in which the corpus of ``config`` is, or will be, prepared.

    Costs a listing of the source's files and a hash of the tokenizer file. Text is read only where a corpus
    was prepared from files of the same names and sizes but other times: content decides (data/content.py). A
    dataset of the hub is known by its name only: what it holds is settled when it is first prepared.

    Raises:
        ConfigError: bad ``data.source``, ``data.tokenizer`` or ``model.vocab``.
    """
    check_source(config.data, config.vocab_unpadded)
    data = config.data
    if _source_problem(data) or tokenizer_files.problem(data):
        return without_source(data, config.vocab_unpadded)[0]
    try:
        with explained("data.tokenizer", data.tokenizer or ""):
            tokenizer = tokenizer_files.identity(data)
        folder = _folder(config, tokenizer)
        return folder if is_usable(folder) else _same_content(config, tokenizer, folder) or folder
    except ConfigError:
        # an earlier version took the first of its own list for the end of text, whatever the files say
        folder = _folder(config, {"tokenizer": tokenizer_files.tokens_hash(data)})
        if data.end_of_text is None and not data.bos and is_usable(folder):
            return folder
        raise


def _folder(config: Config, tokenizer: dict[str, Any]) -> Path:
    source = source_of(config.data.source)
    with explained("data.source", config.data.source):
        source_identity = source.identity(config.data)
    identity = {
        "format": FORMAT,
        "source": source_identity,
        **tokenizer,
        "vocab": config.vocab_unpadded,
        "heldout_share": config.data.heldout_share,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9_]+", "-", source.label(config.data)).strip("-")[:40] or "corpus"
    return Path(config.data.dir).expanduser() / f"{label}-v{config.vocab_unpadded}-{key}"


def prepared_from(config: Config) -> PreparedFrom | None:
    """What a corpus that is prepared now is made of; None of a source without files of its own.

    Reads every file of the source.
    """
    files = source_of(config.data.source).files(config.data)
    return _prepared_from(config, tokenizer_files.identity(config.data), files) if files else None


def _prepared_from(config: Config, tokenizer: dict[str, Any], files: list[SourceFile]) -> PreparedFrom:
    return PreparedFrom(
        names=names_digest(files),
        settings=_settings_digest(config, tokenizer),
        content=content_digest(files),
    )


def _settings_digest(config: Config, tokenizer: dict[str, Any]) -> str:
    settings = source_of(config.data.source).identity(config.data)
    settings.pop("files", None)  # names, sizes and times
    return digest([tokenizer, config.vocab_unpadded, config.data.heldout_share, settings])


def _same_content(config: Config, tokenizer: dict[str, Any], folder: Path) -> Path | None:
    """The corpus that was prepared from files of the same content elsewhere, or of other times."""
    same = remembered(folder)
    if same is not None and is_usable(same):
        return same
    files = source_of(config.data.source).files(config.data)
    wanted = (names_digest(files), _settings_digest(config, tokenizer)) if files else None
    alike = [
        (path, made)
        for path, meta in _prepared(folder.parent)
        if (made := meta.prepared_from) is not None and (made.names, made.settings) == wanted
    ]
    if not alike:
        return None
    log.info("comparing %s with what %s was prepared from", config.data.source, alike[0][0])
    content = content_digest(files)
    same = next((path for path, made in alike if made.content == content), None)
    if same is not None:
        remember(folder, same)
    return same


def _prepared(folder: Path) -> Iterator[tuple[Path, Meta]]:
    """Every whole corpus in data.dir."""
    try:
        paths = sorted(folder.glob("[!.]*/meta.json"))
    except OSError:  # data.dir cannot be: whoever makes it says why
        return
    for path in paths:
        with contextlib.suppress(CorpusError):
            yield path.parent, read_meta(path.parent)


def without_source(data: Data, vocab: int) -> list[Path]:
    """Corpora, each of other content, that were prepared from a source, or with a tokenizer, that is gone.

    Known by its path then, and by the settings.
    """
    named = data.tokenizer or "trained on the source"
    if data.tokenizer is None and Path(data.source).expanduser().exists():
        return []  # it is there, and something else is wrong with it
    found = {
        meta.fingerprint: path
        for path, meta in _prepared(Path(data.dir).expanduser())
        if (_absolute(meta.source), _absolute(meta.tokenizer)) == (_absolute(data.source), _absolute(named))
        and (meta.heldout_share, meta.bos is not None) == (data.heldout_share, data.bos)
        and f"-v{vocab}-" in path.name
    }
    return list(found.values())


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


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


class PreparedFrom(_Record):
    """The files and settings that a corpus was made of, each as a digest; data/content.py."""

    names: Digest
    settings: Digest
    content: Digest


class Skipped(_Record):
    """What of the source is in no shard: empty documents, and bad rows where ``data.bad_rows`` is skip."""

    empty_documents: Count = 0
    bad_rows: Count = 0


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
    prepared_from: PreparedFrom | None = None  # of local files, since versions that compare content
    skipped: Skipped = Skipped()

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
