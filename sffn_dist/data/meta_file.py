"""``meta.json``: what a prepared corpus is, and whether it is whole. Reads no tokens; needs no numpy."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sffn_dist.data.sources.base import digest

# of the prepared folder: raise it whenever the same source and settings would give other files
FORMAT: Final = 1
# source bytes of each held-out token, little-endian, in files as the tokens'
HELDOUT_BYTES, BYTES_TYPE, BYTES_SIZE = "heldout_bytes", "<u4", 4


class CorpusError(RuntimeError):
    """A prepared folder cannot be used; the message states which and why."""


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
