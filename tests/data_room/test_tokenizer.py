"""Text <-> ids, and bytes of a token."""

import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from sffn_dist.data.tokenizer import (
    END_OF_TEXT,
    end_of_text,
    load_tokenizer,
    pieces,
    token_bytes,
    train_tokenizer,
)
from sffn_dist.spec.config import ConfigError

TRAINED = train_tokenizer(["def f(x):\n    return x  # naïve 東京 🙂\n" * 30, string.printable], 320)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(deadline=None, max_examples=150)
def test_round_trip_and_bytes_are_exact(text: str) -> None:
    ids = TRAINED.encode(text, add_special_tokens=False).ids
    assert TRAINED.decode(ids, skip_special_tokens=False) == text
    assert token_bytes(TRAINED)[np.array(ids, dtype=int)].sum() == len(text.encode())


def test_a_quoted_separator_is_text() -> None:
    ids = TRAINED.encode(f"say {END_OF_TEXT} aloud").ids
    assert end_of_text(TRAINED) == 0
    assert 0 not in ids
    assert TRAINED.decode(ids) == f"say {END_OF_TEXT} aloud"


def test_training_is_deterministic() -> None:
    texts = [f"some words {i % 17} and other words {i % 5}\n" * 3 for i in range(200)]
    assert train_tokenizer(texts, 400).to_str() == train_tokenizer(texts, 400).to_str()


@given(st.text("ab\n", max_size=60), st.integers(1, 10))
def test_pieces_make_up_the_text(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)


def _word_level(path: Path, vocab: dict[str, int]) -> str:
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))
    return str(path)


def test_a_given_tokenizer(tmp_path: Path) -> None:
    path = _word_level(tmp_path / "t.json", {"[UNK]": 0, "one": 1, "two": 2, "[SEP]": 70_000})
    tokenizer = load_tokenizer(path, 70_001)
    assert end_of_text(tokenizer) == 70_000
    assert len(tokenizer.encode("one two one two").ids) == 4  # its truncation is undone
    assert token_bytes(tokenizer)[[1, 70_000]].tolist() == [3, 0]
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer = .*has 70001 entries, must have at most model\.vocab = 70000"
    ):
        load_tokenizer(path, 70_000)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    path = _word_level(tmp_path / "t.json", {"[UNK]": 0, "one": 1})
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer = .*must have an end-of-text token, one of <\|endoftext\|> </s>"
    ):
        load_tokenizer(path, 300)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*must be a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "t.json"), 300)
