"""Text <-> token ids: a byte-level BPE trained on the corpus, or a given tokenizer.json.

And how many bytes a token stands for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sffn_dist.spec.config import ConfigError

END_OF_TEXT = "<|endoftext|>"
# the first that a given tokenizer has is used
SEPARATORS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
PIECE = 1 << 20  # characters that are encoded in one call


def sample_size(vocab: int) -> int:
    """Characters to train on: about a thousand an entry.

    More costs time and hardly changes the tokens' number.
    """
    return min(30_000_000, max(4_000_000, 1_000 * vocab))


def train_tokenizer(documents: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab`` entries from the first :func:`sample_size` characters.

    Id 0 is the end of text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, sample_size(vocab)), trainer)
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


def load_tokenizer(path: str, vocab: int) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ConfigError: unreadable, more entries than ``vocab`` (``model.vocab``), or without an end-of-text
            token.
    """
    setting = f"data.tokenizer = {json.dumps(path)}"
    try:
        tokenizer = plain(Tokenizer.from_file(str(Path(path).expanduser())))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(
            [f"{setting}: must be a tokenizer.json that the tokenizers library reads: {error}"]
        ) from None
    if vocab_size(tokenizer) > vocab:
        raise ConfigError(
            [f"{setting}: has {vocab_size(tokenizer)} entries, must have at most model.vocab = {vocab}"]
        )
    if end_of_text(tokenizer) is None:
        raise ConfigError([f"{setting}: must have an end-of-text token, one of {' '.join(SEPARATORS)}"])
    return tokenizer


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Make a tokenizer encode all of the text and nothing else; changes and returns it.

    Files from the hub may cut or pad what they encode. A document that quotes ``<|endoftext|>`` must not be
    taken for two.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "treat their text like any other"
    return tokenizer


def differing_tokens(first: str, second: str) -> list[str]:
    """Tokens to which two tokenizer.json texts give different ids, those of one only included."""
    ids, other_ids = (Tokenizer.from_str(text).get_vocab(with_added_tokens=True) for text in (first, second))
    return sorted(token for token in ids.keys() | other_ids.keys() if ids.get(token) != other_ids.get(token))


def vocab_size(tokenizer: Tokenizer) -> int:
    """Highest id + 1; ids may have holes, so this is not the number of entries."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """Id of the token put after each document, or None."""
    return next(
        (token_id for name in SEPARATORS if (token_id := tokenizer.token_to_id(name)) is not None), None
    )


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """True if the tokens' characters stand for one byte of text each."""
    tree = json.loads(tokenizer.to_str())
    decoder = tree.get("decoder") or {}
    kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}
    return "ByteLevel" in kinds and tree.get("normalizer") is None


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """UTF-8 bytes of text that each token id stands for, (vocab,); the end of text stands for none.

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
    separator = end_of_text(tokenizer)
    if separator is not None:
        lengths[separator] = 0
    return lengths
