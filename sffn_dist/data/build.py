"""The contents of a prepared folder: documents are split, encoded and written, then described in
meta.json.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sffn_dist.atomic_io import hash_file
from sffn_dist.data.corpus import documents
from sffn_dist.data.metadata import FORMAT, Meta, Split, dump_meta, fingerprint
from sffn_dist.data.shards import SHARD_TOKENS, ShardWriter, Tokens, TokenStream, token_dtype, unigram_entropy
from sffn_dist.data.tokenizer import (
    end_of_text,
    is_byte_level,
    load_tokenizer,
    pieces,
    token_bytes,
    train_tokenizer,
    vocab_size,
)
from sffn_dist.spec.config import Config, ConfigError

log = logging.getLogger(__name__)

BATCH = 4 << 20  # characters encoded in one call, by all cores
_NEWS = 5.0  # seconds between lines of progress


class _Piece(NamedTuple):
    """Part of a document on its way to the encoder.

    ``last`` ends the document, whose UTF-8 length is ``size``.
    """

    text: str
    heldout: bool
    last: bool
    size: int


class _Side:
    """A split being written. Remembers its last document, which may have to move."""

    def __init__(self, writer: ShardWriter, lengths: NDArray[np.uint32]):
        self.writer, self._lengths = writer, lengths
        self.documents = self.bytes = self.counted = 0  # counted: bytes by the tokens
        self.last_tokens = self.last_bytes = self._open_tokens = 0

    def add(self, tokens: Tokens, last: bool, size: int) -> None:
        self.writer.append(tokens)
        self.counted += int(self._lengths[tokens].sum(dtype=np.int64))
        self._open_tokens += len(tokens)
        if last:
            self.documents += 1
            self.bytes += size
            self.last_tokens, self.last_bytes, self._open_tokens = self._open_tokens, size, 0

    def split(self) -> Split:
        return Split(
            documents=self.documents, tokens=self.writer.tokens, bytes=self.bytes, shards=self.writer.finish()
        )


def build(config: Config, folder: Path, name: str, shard_tokens: int = SHARD_TOKENS) -> Meta:
    """Fill an empty folder with the corpus of ``config``; returns what its meta.json holds.

    Raises:
        ConfigError: the source holds no text or cannot be read; the tokenizer cannot be used.
    """
    tokenizer = _tokenizer(config)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    lengths = token_bytes(tokenizer)
    np.save(folder / "token_bytes.npy", lengths)
    dtype = token_dtype(len(lengths))
    train, heldout = (
        _Side(ShardWriter(folder, split, dtype, shard_tokens), lengths) for split in ("train", "heldout")
    )
    _write(config, tokenizer, train, heldout)
    if not train.documents and not heldout.documents:
        raise ConfigError(
            [f"data.source = {config.data.source!r}: must hold text; every document in it is empty"]
        )
    balance(train, heldout, config.data.heldout_share)
    if not train.writer.tokens or not heldout.writer.tokens:
        raise ConfigError([f"data.source = {config.data.source!r}: must hold at least two tokens of text"])
    meta = _describe(config, folder, name, tokenizer, train, heldout)
    (folder / "meta.json").write_text(dump_meta(meta), encoding="utf-8")
    return meta


def _tokenizer(config: Config) -> Tokenizer:
    if config.data.tokenizer is not None:
        return load_tokenizer(config.data.tokenizer, config.vocab_unpadded)
    started = time.monotonic()
    tokenizer = train_tokenizer(documents(config.data), config.vocab_unpadded)
    log.info(
        "trained a byte-level BPE of %d entries in %.1f s", vocab_size(tokenizer), time.monotonic() - started
    )
    return tokenizer


def is_heldout(text: bytes, share: float) -> bool:
    """Whether a document is held out: by a keyed hash of its content, so copies of it fall on the same
    side, in any order.
    """
    digest = hashlib.blake2b(text, digest_size=8, key=b"sffn_dist held-out").digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


def _pieces(texts: Iterable[str], share: float) -> Iterator[_Piece]:
    for text in texts:
        # "replace": JSON may hold half a surrogate pair, which is no text
        raw = text.encode("utf-8", errors="replace")
        parts = list(pieces(raw.decode()))
        heldout = is_heldout(raw, share)
        for index, part in enumerate(parts, start=1):
            yield _Piece(part, heldout, index == len(parts), len(raw))


def _batches(stream: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(config: Config, tokenizer: Tokenizer, train: _Side, heldout: _Side) -> None:
    """Encode every document, an end of text after each, and write it to its side."""
    separator = np.array([end_of_text(tokenizer)], dtype=np.int64)
    started = last_logged = time.monotonic()
    for batch in _batches(_pieces(documents(config.data), config.data.heldout_share)):
        encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            side = heldout if piece.heldout else train
            side.add(np.concatenate([ids, separator]) if piece.last else ids, piece.last, piece.size)
        now = time.monotonic()
        if now - last_logged >= _NEWS:
            last_logged = now
            done, tokens = train.bytes + heldout.bytes, train.writer.tokens + heldout.writer.tokens
            log.info(
                "encoded %.1f MB, %.1f M tokens, %.1f MB/s",
                done / 1e6,
                tokens / 1e6,
                done / 1e6 / (now - started),
            )


def balance(train: _Side, heldout: _Side, share: float) -> None:
    """See that neither side is empty, which a corpus of few documents may come to.

    The full side gives its last document to the empty one. The document of a corpus that has only one is cut
    by position: its last tokens, a share of ``share``, are held out (and it counts as a document on each
    side).
    """
    if train.documents and heldout.documents:
        return
    full, empty = (train, heldout) if train.documents else (heldout, train)
    tokens, size = full.last_tokens, full.last_bytes
    single = full.documents == 1
    if single:
        kept = full.writer.tokens
        tokens = min(max(1, round(kept * (share if full is train else 1 - share))), kept - 1)
    moved = full.writer.pop(tokens)
    before = empty.counted
    empty.add(moved, True, size)
    full.counted -= empty.counted - before
    if single:
        empty.bytes = min(empty.counted, size)
        full.bytes = size - empty.bytes
    else:
        full.documents -= 1
        full.bytes -= size


def _describe(
    config: Config, folder: Path, name: str, tokenizer: Tokenizer, train: _Side, heldout: _Side
) -> Meta:
    sides = {"train": train.split(), "heldout": heldout.split()}
    dtype = train.writer.dtype
    sha256 = hash_file(folder / "tokenizer.json")
    exact = is_byte_level(tokenizer) and (train.counted, heldout.counted) == (train.bytes, heldout.bytes)
    if not exact:
        log.warning(
            "with this tokenizer the bytes of a slice of tokens, and so bits per byte, are an estimate"
        )
    vocab, separator = vocab_size(tokenizer), end_of_text(tokenizer)
    assert separator is not None  # load_tokenizer and train_tokenizer see to it
    packages = {package: version(package) for package in ("datasets", "numpy", "tokenizers")}
    return Meta(
        format=FORMAT,
        name=name,
        fingerprint=fingerprint(sha256, sides["train"].shards, sides["heldout"].shards),
        source=config.data.source,
        tokenizer=config.data.tokenizer or "trained on the source",
        tokenizer_sha256=sha256,
        vocab=vocab,
        end_of_text=separator,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        heldout_share=config.data.heldout_share,
        byte_exact=exact,
        unigram_entropy=unigram_entropy(TokenStream(folder, sides["heldout"], dtype), vocab),
        versions={"python": platform.python_version(), **packages},
        **sides,
    )
