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
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sffn_dist.data import tokenizer_files
from sffn_dist.data.content import content_digest, names_digest, remember, remembered
from sffn_dist.data.meta_file import FORMAT, CorpusError, Meta, PreparedFrom, is_usable, read_meta
from sffn_dist.data.sources import forms, source_of
from sffn_dist.data.sources.base import digest
from sffn_dist.data.sources.files import SourceFile
from sffn_dist.spec.config import Config, ConfigError, Data
from sffn_dist.spec.disk_errors import explained

log = logging.getLogger(__name__)

SMALLEST_VOCAB = 257  # 256 bytes and the end-of-text token


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
        with explained("data.tokenizer", data.tokenizer or ""):
            tokens_hash = tokenizer_files.tokens_hash(data)
        folder = _folder(config, {"tokenizer": tokens_hash})
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
