"""Token streams on disk: written once, read through memory maps.

A split is one sequence of tokens, cut into files of :data:`SHARD_TOKENS`. Tokens are little-endian uint16
where every id of the vocabulary fits, else uint32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sffn_dist.atomic_io import hash_file
from sffn_dist.data.batches import read_heldout
from sffn_dist.data.meta_file import (
    BYTES_TYPE,
    CorpusError,
    Meta,
    Shard,
    Split,
    read_meta,
)
from sffn_dist.data.tokenizer import plain

SHARD_TOKENS = 1 << 28
_CHUNK = 1 << 24  # tokens looked at in one go

Tokens = NDArray[np.integer[Any]]


def token_dtype(vocab: int) -> np.dtype[Any]:
    """The smallest type that holds ids below ``vocab``."""
    return np.dtype("<u2") if vocab <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Appends tokens to ``folder/<split>-00000.bin`` and so on."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int = SHARD_TOKENS):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.tokens = 0

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.split}-{shard:05d}.bin"

    def append(self, tokens: Tokens) -> None:
        """Write (n,) tokens at the end.

        Raises:
            OverflowError: an id that the type does not hold (a plain cast would silently wrap it around).
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(self.dtype).max:
            raise OverflowError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        done = 0
        while done < len(tokens):
            shard, used = divmod(self.tokens, self.shard_tokens)
            part = tokens[done : done + self.shard_tokens - used]
            with open(self._path(shard), "ab") as file:
                file.write(part.astype(self.dtype).tobytes())
            done += len(part)
            self.tokens += len(part)

    def pop(self, count: int) -> Tokens:
        """Take the last ``count`` tokens off the end; (count,)."""
        chunks = []
        while count:
            shard = (self.tokens - 1) // self.shard_tokens
            path, in_shard = self._path(shard), self.tokens - shard * self.shard_tokens
            part = min(count, in_shard)
            chunks.append(np.fromfile(path, dtype=self.dtype, offset=(in_shard - part) * self.dtype.itemsize))
            os.truncate(path, (in_shard - part) * self.dtype.itemsize)
            if part == in_shard:
                path.unlink()
            self.tokens -= part
            count -= part
        return np.concatenate(chunks[::-1]) if chunks else np.zeros(0, dtype=self.dtype)

    def finish(self) -> tuple[Shard, ...]:
        """What was written, with each file's sha256."""
        shards = []
        for index, start in enumerate(range(0, self.tokens, self.shard_tokens)):
            path = self._path(index)
            shards.append(
                Shard(
                    file=path.name, tokens=min(self.shard_tokens, self.tokens - start), sha256=hash_file(path)
                )
            )
        return tuple(shards)


class TokenStream:
    """The tokens of one split as one read-only sequence, whatever files it lies in.

    Slices copy what they name and no more.
    """

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[Any]):
        self.dtype = dtype
        self._parts = [
            np.memmap(folder / shard.file, dtype=dtype, mode="r", shape=(shard.tokens,))
            for shard in split.shards
        ]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Tokens: ...
    def __getitem__(self, index: int | slice) -> int | Tokens:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"step {step} of a slice of tokens: must be 1")
            return self._read(start, max(start, stop))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"token {index} of {len(self)}")
        return int(self._read(place, place + 1)[0])

    def _read(self, start: int, stop: int) -> Tokens:
        out = np.empty(stop - start, dtype=self.dtype)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < len(out):
            part = self._parts[shard]
            begin = start + done - (int(self._ends[shard]) - len(part))
            piece = part[begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out


@dataclass(frozen=True)
class HeldoutSample:
    """What evaluations need: (n, S+1) windows, and the bytes of text that their labels stand for.

    ``estimated``: by a table of bytes a token, where no bytes were counted when the text was encoded.
    """

    windows: NDArray[np.int64]
    text_bytes: int
    estimated: bool = False


class Corpus:
    """A prepared corpus, opened.

    ``train`` and ``heldout`` are token streams; the rest is loaded when first asked for.
    """

    def __init__(self, folder: Path, meta: Meta):
        self.folder, self.meta = folder, meta
        dtype = np.dtype(meta.dtype).newbyteorder("<")
        self.train = TokenStream(folder, meta.train, dtype)
        self.heldout = TokenStream(folder, meta.heldout, dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return plain(Tokenizer.from_file(str(self.folder / "tokenizer.json")))

    @cached_property
    def token_bytes(self) -> NDArray[np.uint32]:
        """UTF-8 bytes of text a token id stands for, (meta.vocab,).

        Exact if ``meta.byte_exact``, else an estimate.
        """
        lengths: NDArray[np.uint32] = np.load(self.folder / "token_bytes.npy", allow_pickle=False)
        return lengths

    def heldout_sample(self, sequence: int, count: int) -> HeldoutSample:
        """Evenly spaced held-out windows, at most ``count``, as batches.read_heldout chooses them.

        Raises ConfigError: fewer tokens than one window needs.
        """
        windows = read_heldout(self.heldout, sequence, count)
        if self.meta.byte_exact or not self.meta.heldout_bytes:
            text_bytes = int(self.token_bytes[windows[:, 1:]].sum(dtype=np.int64))
            return HeldoutSample(windows, text_bytes, estimated=not self.meta.byte_exact)
        split = self.meta.heldout.model_copy(update={"shards": self.meta.heldout_bytes})
        counts = read_heldout(TokenStream(self.folder, split, np.dtype(BYTES_TYPE)), sequence, count)
        return HeldoutSample(windows, int(counts[:, 1:].sum()))


def open_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Open a prepared folder.

    Raises:
        CorpusError: nothing prepared there, or not whole.
    """
    folder = Path(folder)
    return Corpus(folder, read_meta(folder))


def verify(folder: str | os.PathLike[str]) -> None:
    """Read every file and compare it with its sha256 in meta.json; raises CorpusError.

    Costs a pass over the data.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    shards = (*meta.train.shards, *meta.heldout.shards, *meta.heldout_bytes)
    sums = {shard.file: shard.sha256 for shard in shards}
    for name, sha256 in {**sums, "tokenizer.json": meta.tokenizer_sha256}.items():
        if hash_file(folder / name) != sha256:
            raise CorpusError(f"{folder}: {name} is damaged (its sha256 is not the one in meta.json)")


def unigram_entropy(tokens: TokenStream | Tokens, vocab: int) -> float:
    """Entropy in nats a token of the tokens' own frequencies: the loss of the best model that ignores
    context.
    """
    counts = np.zeros(vocab, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        counts += np.bincount(tokens[start : start + _CHUNK], minlength=vocab)
    share = counts[counts > 0] / len(tokens)
    return max(0.0, float(-(share * np.log(share)).sum()))
