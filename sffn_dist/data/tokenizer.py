"""Text <-> token ids: a byte-level BPE trained on the corpus, or a given tokenizer (data/tokenizer_files.py).

And how many bytes a token stands for.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sffn_dist.data import tokenizer_conversion, tokenizer_files
from sffn_dist.data.tokenizer_files import Settings
from sffn_dist.spec.config import ConfigError, Data

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"  # of a tokenizer trained on the source
PIECE = 1 << 20  # characters that are encoded in one call


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer and the ids put around each document; ``settings`` go along to checkpoints, exports."""

    tokenizer: Tokenizer
    end_of_text: int
    bos: int | None
    settings: Settings


def sample_size(vocab: int) -> int:
    """Characters to train on: about a thousand an entry.

    More costs time and hardly changes the tokens' number.
    """
    return min(30_000_000, max(4_000_000, 1_000 * vocab))


def train_tokenizer(documents: Iterable[str], vocab: int, end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """A byte-level BPE of at most ``vocab`` entries from the first :func:`sample_size` characters.

    Id 0 is the end of text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[AddedToken(end_of_text, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    started, size = time.monotonic(), sample_size(vocab)
    log.info("training a tokenizer of %s entries on the first %.0f M characters", f"{vocab:,}", size / 1e6)
    tokenizer.train_from_iterator(_sample(documents, size), trainer)
    log.info("trained the tokenizer in %.1f s", time.monotonic() - started)
    return plain(tokenizer)


def _sample(documents: Iterable[str], size: int) -> Iterator[str]:
    for document in documents:
        for piece in pieces(document):
            yield piece[:size]
            size -= len(piece)
            if size <= 0:
                return


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text into parts of at most ``size`` characters, after a line break where there is one.

    An encoding takes many times the memory of its text, and pieces of a long document can be encoded side by
    side.
    """
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def trained(tokenizer: Tokenizer, end_of_text: str = END_OF_TEXT) -> CorpusTokenizer:
    """What :func:`train_tokenizer` made: the end of text also begins texts and pads in exports."""
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end_of_text)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return CorpusTokenizer(tokenizer, 0, None, Settings(names, {**ids, "do_sample": False}))


def load_tokenizer(data: Data, vocab: int) -> CorpusTokenizer:
    """Read ``data.tokenizer``, with ``data.end_of_text`` and ``data.bos``.

    Raises:
        ConfigError: unreadable, more entries than ``vocab`` (``model.vocab``), or without one of the tokens
            to put around documents.
    """
    setting = f"data.tokenizer = {json.dumps(data.tokenizer)}"
    files = tokenizer_files.named(data)
    try:
        text = tokenizer_conversion.read_text(files)
        tokenizer = plain(Tokenizer.from_str(text))
    except tokenizer_conversion.MissingPackage as error:
        raise ConfigError([f"{setting}: {error}"]) from None
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError([f"{setting}: must be {tokenizer_files.FORMS}: {error}"]) from None
    if vocab_size(tokenizer) > vocab:
        raise ConfigError(
            [f"{setting}: has {vocab_size(tokenizer)} entries, must have at most model.vocab = {vocab}"]
        )
    settings, ids = tokenizer_files.settings(files.folder), tokenizer.get_vocab(with_added_tokens=True)
    if not data.bos and tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        log.warning("%s: puts tokens around a text by itself; data.bos = false: training does not", setting)
    end, begin = (
        tokenizer_files.end_of_text(data, settings, ids),
        tokenizer_files.beginning_of_text(data, settings, ids),
    )
    return CorpusTokenizer(
        tokenizer, ids[end], None if begin is None else ids[begin], _used(settings, end, ids[end])
    )


def _used(settings: Settings, end: str, index: int) -> Settings:
    """The settings with the end of text that training puts: generation must stop there too."""
    stops = settings.generation.get("eos_token_id")
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop not in (None, index)]
    generation: dict[str, Any] = {**settings.generation, "eos_token_id": [index, *stops] if stops else index}
    return Settings({**settings.tokenizer, "eos_token": end}, generation)


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Make a tokenizer encode all of the text and nothing else; changes and returns it.

    Files from the hub may cut or pad what they encode. A document that quotes ``<|endoftext|>`` must not be
    taken for two.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "treat their text like any other"
    return tokenizer


def encoding_as_trained(text: str, bos: str | None) -> str:
    """A tokenizer.json that puts ``bos`` before a text, or nothing; the same text where it does so already.

    What it adds by itself (a template of special tokens) goes; ids of the text stay.
    """
    tokenizer = Tokenizer.from_str(text)
    begin = [] if bos is None else [tokenizer.token_to_id(bos)]
    samples = ("", "a b")
    if all(
        tokenizer.encode(sample).ids == begin + tokenizer.encode(sample, add_special_tokens=False).ids
        for sample in samples
    ):
        return text
    tree = json.loads(text)
    kept = [part for part in _processors(tree.get("post_processor")) if part["type"] == "ByteLevel"]
    if bos is not None:
        token = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        kept.append(
            {
                "type": "TemplateProcessing",
                "single": [token, first],
                "pair": [token, first, token, second],
                "special_tokens": {bos: {"id": bos, "ids": begin, "tokens": [bos]}},
            }
        )
    tree["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return json.dumps(tree, ensure_ascii=False)


def _processors(tree: dict[str, Any] | None) -> list[dict[str, Any]]:
    if tree is None:
        return []
    if tree["type"] != "Sequence":
        return [tree]
    return [part for inner in tree["processors"] for part in _processors(inner)]


def differing_tokens(first: str, second: str) -> list[str]:
    """Tokens to which two tokenizer.json texts give different ids, those of one only included."""
    ids, other_ids = (Tokenizer.from_str(text).get_vocab(with_added_tokens=True) for text in (first, second))
    return sorted(token for token in ids.keys() | other_ids.keys() if ids.get(token) != other_ids.get(token))


def vocab_size(tokenizer: Tokenizer) -> int:
    """Highest id + 1; ids may have holes, so this is not the number of entries."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """True if the tokens' characters stand for one byte of text each."""
    tree = json.loads(tokenizer.to_str())
    decoder = tree.get("decoder") or {}
    kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}
    return "ByteLevel" in kinds and tree.get("normalizer") is None


def token_bytes(tokenizer: Tokenizer, without_text: Iterable[int] = ()) -> NDArray[np.uint32]:
    """UTF-8 bytes of text that each token id stands for, (vocab,); ids ``without_text`` stand for none: what
    is put around documents.

    Exact where :func:`is_byte_level`; else the bytes of the token decoded alone, an estimate (a decoder may
    drop a leading space, or show part of a character as a replacement character).
    """
    lengths = np.zeros(vocab_size(tokenizer), dtype=np.uint32)
    alphabet, exact = set(pre_tokenizers.ByteLevel.alphabet()), is_byte_level(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    for text, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths[index] = len(text.encode())
        elif exact:
            lengths[index] = len(text) if alphabet.issuperset(text) else len(text.encode())
        else:
            lengths[index] = len(tokenizer.decode([index], skip_special_tokens=False).encode())
    lengths[list(without_text)] = 0
    return lengths
