"""The contents of a prepared folder: documents are split, encoded and written, then described in
meta.json.
"""

from __future__ import annotations

import hashlib
import io
import logging
import platform
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sffn_dist.atomic_io import hash_file
from sffn_dist.data.byte_counts import Counts, counting, source_bytes
from sffn_dist.data.corpus import Passed, check, documents
from sffn_dist.data.meta_file import (
    BYTES_TYPE,
    FORMAT,
    HELDOUT_BYTES,
    Meta,
    Skipped,
    Split,
    dump_meta,
    fingerprint,
)
from sffn_dist.data.metadata import prepared_from
from sffn_dist.data.shards import SHARD_TOKENS, ShardWriter, Tokens, TokenStream, token_dtype, unigram_entropy
from sffn_dist.data.sources import source_of
from sffn_dist.data.tokenizer import (
    END_OF_TEXT,
    CorpusTokenizer,
    is_byte_level,
    load_tokenizer,
    pieces,
    token_bytes,
    train_tokenizer,
    trained,
    vocab_size,
)
from sffn_dist.spec.config import Config, ConfigError

log = logging.getLogger(__name__)

BATCH = 4 << 20  # characters encoded in one call, by all cores
_NEWS = 5.0  # seconds between lines of progress


class _Piece(NamedTuple):
    """Part of a document on its way to the encoder.

    ``first`` begins the document and ``last`` ends it; its UTF-8 length is ``size``.
    """

    text: str
    heldout: bool
    first: bool
    last: bool
    size: int


class _Side:
    """A split being written. Remembers its last document, which may have to move."""

    def __init__(self, writer: ShardWriter, lengths: Counts, byte_writer: ShardWriter | None = None):
        self.writer, self._lengths, self.byte_writer = writer, lengths, byte_writer
        self.last_counts: list[Counts] = []  # of its last document, if they were counted
        self.documents = self.bytes = self.counted = 0  # counted: bytes by the tokens
        self.last_tokens = self.last_bytes = self._open_tokens = 0

    def add(self, tokens: Tokens, last: bool, size: int, counts: Counts | None = None) -> None:
        """``counts``: source bytes of each token, kept where the side has a place for them."""
        if not self._open_tokens:
            self.last_counts = []
        self.writer.append(tokens)
        if counts is not None:
            self.last_counts.append(counts)
            if self.byte_writer is not None:
                self.byte_writer.append(counts)
        self.counted += int(self._lengths[tokens].sum(dtype=np.int64))
        self._open_tokens += len(tokens)
        if last:
            self.documents += 1
            self.bytes += size
            self.last_tokens, self.last_bytes, self._open_tokens = self._open_tokens, size, 0

    def pop(self, tokens: int) -> tuple[Tokens, Counts]:
        """Take tokens of the last document off the end, with their bytes."""
        if self.byte_writer is not None:
            self.byte_writer.pop(tokens)
        return self.writer.pop(tokens), np.concatenate(self.last_counts)[-tokens:]

    def split(self) -> Split:
        return Split(
            documents=self.documents, tokens=self.writer.tokens, bytes=self.bytes, shards=self.writer.finish()
        )


def build(config: Config, folder: Path, name: str, shard_tokens: int = SHARD_TOKENS) -> Meta:
    """Fill an empty folder with the corpus of ``config``; returns what its meta.json holds.

    Raises:
        ConfigError: the source holds no text or cannot be read; the tokenizer cannot be used.
    """
    for line in source_of(config.data.source).contents(config.data):
        log.info("data.source %s", line)
    check(config.data)
    chosen = _tokenizer(config)
    tokenizer = chosen.tokenizer
    # tokenizers and numpy write files themselves, but do not say why when that fails
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    for file, text in chosen.settings.texts().items():
        (folder / file).write_text(text, encoding="utf-8")
    lengths = token_bytes(tokenizer, {chosen.end_of_text, *(() if chosen.bos is None else (chosen.bos,))})
    array = io.BytesIO()
    np.save(array, lengths)
    (folder / "token_bytes.npy").write_bytes(array.getvalue())
    dtype = token_dtype(len(lengths))
    byte_writer = ShardWriter(folder, HELDOUT_BYTES, np.dtype(BYTES_TYPE), shard_tokens)
    train = _Side(ShardWriter(folder, "train", dtype, shard_tokens), lengths)
    heldout = _Side(ShardWriter(folder, "heldout", dtype, shard_tokens), lengths, byte_writer)
    skipped = _write(config, chosen, train, heldout)
    if not train.documents and not heldout.documents:
        raise ConfigError(
            [f"data.source = {config.data.source!r}: must hold text; every document in it is empty"]
        )
    balance(train, heldout, config.data.heldout_share)
    if not train.writer.tokens or not heldout.writer.tokens:
        raise ConfigError([f"data.source = {config.data.source!r}: must hold at least two tokens of text"])
    meta = _describe(config, folder, name, chosen, train, heldout, skipped)
    (folder / "meta.json").write_text(dump_meta(meta), encoding="utf-8")
    return meta


def _tokenizer(config: Config) -> CorpusTokenizer:
    if config.data.tokenizer is not None:
        return load_tokenizer(config.data, config.vocab_unpadded)
    started = time.monotonic()
    end = config.data.end_of_text or END_OF_TEXT
    tokenizer = train_tokenizer(documents(config.data), config.vocab_unpadded, end)
    log.info(
        "trained a byte-level BPE of %d entries in %.1f s", vocab_size(tokenizer), time.monotonic() - started
    )
    return trained(tokenizer, end)


def is_heldout(text: bytes, share: float) -> bool:
    """Whether a document is held out: by a keyed hash of its content, so copies of it fall on the same
    side, in any order.
    """
    digest = hashlib.blake2b(text, digest_size=8, key=b"sffn_dist held-out").digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


class _Texts:
    """Documents on their way to pieces. Counts those that hold the end of text as text."""

    def __init__(self, separator: str):
        self._separator, self.separators = separator, 0

    def pieces(self, texts: Iterable[str], share: float) -> Iterator[_Piece]:
        for text in texts:
            self.separators += self._separator in text
            raw = text.encode()
            heldout, size = is_heldout(raw, share), len(raw)
            del raw
            ahead = pieces(text)
            part, first = next(ahead), True
            for following in ahead:
                yield _Piece(part, heldout, first, False, size)
                part, first = following, False
            yield _Piece(part, heldout, first, True, size)

    def lines(self) -> Iterator[str]:
        """What a reader of the log should hear."""
        if self.separators:
            yield (
                f"{self.separators:,} documents hold the text {self._separator!r}: it is encoded as ordinary "
                "text and ends no document; inside .txt files data.document_separator makes it do so"
            )


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


def _write(config: Config, chosen: CorpusTokenizer, train: _Side, heldout: _Side) -> Skipped:
    """Encode every document, an end of text after each, and write it to its side."""
    tokenizer, end = chosen.tokenizer, np.array([chosen.end_of_text], dtype=np.int64)
    begin = np.array([] if chosen.bos is None else [chosen.bos], dtype=np.int64)
    exact = counting(tokenizer)
    started = last_logged = time.monotonic()
    rest = 0  # bytes of the document that no token has yet
    passed, texts, done = Passed(), _Texts(str(tokenizer.id_to_token(chosen.end_of_text))), 0
    for batch in _batches(texts.pieces(documents(config.data, passed), config.data.heldout_share)):
        # training text too until something is held out: its last document may have to move
        counted = [piece.heldout or not heldout.documents for piece in batch]
        fast = [piece.text for piece, count in zip(batch, counted, strict=True) if not count]
        slow = [piece.text for piece, count in zip(batch, counted, strict=True) if count]
        encodings = iter(tokenizer.encode_batch_fast(fast, add_special_tokens=False))
        with_offsets = iter(exact.encode_batch(slow, add_special_tokens=False))
        for piece, count in zip(batch, counted, strict=True):
            encoding = next(with_offsets if count else encodings)
            ids = np.array(encoding.ids, dtype=np.int64)
            before, after = begin if piece.first else begin[:0], end if piece.last else end[:0]
            counts = None
            if count:
                own, rest = source_bytes(piece.text, encoding.offsets, 0 if piece.first else rest)
                counts = np.concatenate([0 * before, own, rest * (after >= 0)]).astype(np.uint32)
            side = heldout if piece.heldout else train
            side.add(np.concatenate([before, ids, after]), piece.last, piece.size, counts)
            done += len(piece.text)
        now = time.monotonic()
        if now - last_logged >= _NEWS:
            last_logged = now
            log.info(
                "encoded %s documents and what is done of the next, %.1f M characters, %.1f M tokens, %.1f M "
                "characters/s",
                f"{train.documents + heldout.documents:,}",
                done / 1e6,
                (train.writer.tokens + heldout.writer.tokens) / 1e6,
                done / 1e6 / (now - started),
            )
    for line in (*passed.lines(), *texts.lines()):
        log.warning("%s", line)
    return Skipped(empty_documents=passed.empty_documents, bad_rows=passed.bad_rows)


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
    moved, counts = full.pop(tokens)
    by_table = full.counted == size  # to the byte, where a token ends inside a character too
    empty.add(moved, True, size, counts)
    full.counted -= empty.counted
    if single:
        empty.bytes = empty.counted if by_table else int(counts.sum())
        full.bytes = size - empty.bytes
    else:
        full.documents -= 1
        full.bytes -= size


def _describe(
    config: Config,
    folder: Path,
    name: str,
    chosen: CorpusTokenizer,
    train: _Side,
    heldout: _Side,
    skipped: Skipped,
) -> Meta:
    tokenizer = chosen.tokenizer
    sides = {"train": train.split(), "heldout": heldout.split()}
    dtype = train.writer.dtype
    sha256 = hash_file(folder / "tokenizer.json")
    exact = is_byte_level(tokenizer) and (train.counted, heldout.counted) == (train.bytes, heldout.bytes)
    assert heldout.byte_writer is not None
    if exact:  # the table says as much
        heldout.byte_writer.pop(heldout.byte_writer.tokens)
    vocab = vocab_size(tokenizer)
    packages = {package: version(package) for package in ("datasets", "numpy", "pyarrow", "tokenizers")}
    return Meta(
        format=FORMAT,
        name=name,
        fingerprint=fingerprint(sha256, sides["train"].shards, sides["heldout"].shards),
        source=config.data.source,
        tokenizer=config.data.tokenizer or "trained on the source",
        tokenizer_sha256=sha256,
        vocab=vocab,
        end_of_text=chosen.end_of_text,
        bos=chosen.bos,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        heldout_share=config.data.heldout_share,
        byte_exact=exact,
        heldout_bytes=heldout.byte_writer.finish(),
        unigram_entropy=unigram_entropy(TokenStream(folder, sides["heldout"], dtype), vocab),
        prepared_from=prepared_from(config),
        versions={"python": platform.python_version(), **packages},
        skipped=skipped,
        **sides,
    )
