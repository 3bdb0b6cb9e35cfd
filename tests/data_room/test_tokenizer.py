"""Text <-> ids, and bytes of a token."""

import base64
import itertools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from sffn_dist.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    pieces,
    token_bytes,
    train_tokenizer,
)
from sffn_dist.data.tokenizer_conversion import SAMPLES
from sffn_dist.spec.config import ConfigError, Data

TRAINED = train_tokenizer(["def f(x):\n    return x  # naïve 東京 🙂\n" * 30, string.printable], 320)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(deadline=None, max_examples=150)
def test_round_trip_and_bytes_are_exact(text: str) -> None:
    ids = TRAINED.encode(text, add_special_tokens=False).ids
    assert TRAINED.decode(ids, skip_special_tokens=False) == text
    assert token_bytes(TRAINED)[np.array(ids, dtype=int)].sum() == len(text.encode())


def test_a_quoted_separator_is_text() -> None:
    ids = TRAINED.encode(f"say {END_OF_TEXT} aloud").ids
    assert TRAINED.token_to_id(END_OF_TEXT) == 0
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
    data = Data(tokenizer=path, end_of_text="[SEP]")
    loaded = load_tokenizer(data, 70_001)
    assert loaded.end_of_text == 70_000
    assert len(loaded.tokenizer.encode("one two one two").ids) == 4  # its truncation is undone
    assert token_bytes(loaded.tokenizer, [70_000])[[1, 70_000]].tolist() == [3, 0]
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer = .*has 70001 entries, must have at most model\.vocab = 70000"
    ):
        load_tokenizer(data, 70_000)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer = .*must be a folder, or a file, of tokenizer\.json"
    ):
        load_tokenizer(Data(tokenizer=str(tmp_path / "t.json")), 300)


# ---------------------------------------------------------------- what the files beside a tokenizer say of it


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"eos_token_id": 2}}, 2),
        ({"generation_config.json": {"eos_token_id": [3]}}, 3),
        ({"tokenizer_config.json": {"eos_token": "<stop>"}}, 3),
        ({"special_tokens_map.json": {"eos_token": {"content": "<stop>"}}}, 3),
        # Llama 3's: every file that names any names it
        ({"config.json": {"eos_token_id": [2, 3]}, "tokenizer_config.json": {"eos_token": "<stop>"}}, 3),
    ],
)
def test_the_end_of_text_is_what_the_files_say(
    tmp_path: Path, files: dict[str, dict[str, Any]], expected: int
) -> None:
    """Never the first of a list of usual names: </s> is a token here too."""
    _word_level(tmp_path / "tokenizer.json", {"[UNK]": 0, "</s>": 1, "two": 2, "<stop>": 3})
    for name, tree in files.items():
        (tmp_path / name).write_text(json.dumps(tree))
    for named in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(Data(tokenizer=str(named)), 10).end_of_text == expected
    assert load_tokenizer(Data(tokenizer=str(tmp_path), end_of_text="two"), 10).end_of_text == 2


def test_an_end_of_text_that_nobody_names_is_asked_for(tmp_path: Path) -> None:
    _word_level(tmp_path / "tokenizer.json", {"[UNK]": 0, "</s>": 1, "<|endoftext|>": 2, "<stop>": 3})
    data = Data(tokenizer=str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.end_of_text = null: .*no file beside it says eos_token"):
        load_tokenizer(data, 10)
    with pytest.raises(ConfigError, match=r'data\.end_of_text = "<end>": must be a token of data\.tokenizer'):
        load_tokenizer(Data(tokenizer=str(tmp_path), end_of_text="<end>"), 10)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(
        ConfigError, match=r"data\.end_of_text = null: .*config\.json says 1; tokenizer_config"
    ):
        load_tokenizer(data, 10)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 3]}')
    with pytest.raises(ConfigError, match=r"data\.end_of_text = null: .*config\.json says 1, 3"):
        load_tokenizer(data, 10)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json: must hold a JSON object"):
        load_tokenizer(data, 10)


def test_a_folder_of_an_earlier_version_means_what_it_meant(tmp_path: Path) -> None:
    """Its checkpoints and corpora hold no tokenizer_config.json; they put the first of its list."""
    _word_level(tmp_path / "tokenizer.json", {"[UNK]": 0, "</s>": 1, "<|endoftext|>": 2})
    (tmp_path / "manifest.json").write_text("{}")
    assert load_tokenizer(Data(tokenizer=str(tmp_path)), 10).end_of_text == 2
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"data\.end_of_text"):
        load_tokenizer(Data(tokenizer=str(tmp_path)), 10)


def test_tokens_that_the_folder_adds_are_tokens(tmp_path: Path) -> None:
    _word_level(tmp_path / "tokenizer.json", {"[UNK]": 0, "one": 1})
    tree = {"eos_token": "<end>", "added_tokens_decoder": {"2": {"content": "<end>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tree))
    assert load_tokenizer(Data(tokenizer=str(tmp_path)), 3).end_of_text == 2
    with pytest.raises(ConfigError, match=r"has 3 entries, must have at most model\.vocab = 2"):
        load_tokenizer(Data(tokenizer=str(tmp_path)), 2)
    tree["added_tokens_decoder"] = {"7": {"content": "<end>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"token '<end>' must have id 7, the tokenizers library gives it 2"):
        load_tokenizer(Data(tokenizer=str(tmp_path)), 8)


# ---------------------------------------------------------------------------------- other forms of tokenizers


def _sentencepiece_model(path: Path, normalized: bool) -> list[str]:
    """A small SentencePiece unigram model with byte fallback; its pieces."""
    proto_module = pytest.importorskip("transformers.convert_slow_tokenizer").import_protobuf()
    proto = proto_module.ModelProto()
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces = special + [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    pieces += [(text, 1) for text in ("▁", "▁the", "▁fox", "a", "b", "e", "f", "h", "o", "t", "x", "\n")]
    for index, (text, kind) in enumerate(pieces):
        proto.pieces.add(piece=text, score=-float(index % 9) / 4 - len(text) ** -1, type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback, proto.trainer_spec.unk_id = 1, True, 0
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = normalized
    path.write_bytes(proto.SerializeToString())
    return [text for text, _ in pieces]


@pytest.mark.parametrize("normalized", [False, True], ids=["as it is", "spaces removed"])
def test_a_sentencepiece_model(tmp_path: Path, normalized: bool) -> None:
    pieces = _sentencepiece_model(tmp_path / "tokenizer.model", normalized)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    for named in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = load_tokenizer(Data(tokenizer=str(named)), len(pieces))
        assert loaded.end_of_text == 2
        ids = loaded.tokenizer.encode("the  fox ab\n東 ", add_special_tokens=False).ids
        spaces = ["▁"] if not normalized else []
        expected = ["▁the", *spaces, "▁fox", "▁", "a", "b", "\n", "<0xE6>", "<0x9D>", "<0xB1>", *spaces]
        assert [pieces[index] for index in ids] == expected
        assert loaded.tokenizer.decode(ids) == ("the fox ab\n東" if normalized else "the  fox ab\n東 ")


def test_a_sentencepiece_model_encodes_as_sentencepiece(tmp_path: Path) -> None:
    """Of every kind that it trains, where it is installed."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text(
        "\n".join(f"the quick brown fox {i} jumps over naïve café ﬁne {i * i}" for i in range(300))
    )
    for kind, rule in itertools.product(("unigram", "bpe"), ("identity", "nmt_nfkc")):
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / kind), vocab_size=400, model_type=kind,
            minloglevel=2, byte_fallback=True, normalization_rule_name=rule, hard_vocab_limit=False,
        )  # fmt: skip
        model = tmp_path / f"{kind}.model"
        loaded = load_tokenizer(Data(tokenizer=str(model), end_of_text="</s>"), 400)
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        for sample in (*SAMPLES, " the  ﬁne fox\n 東京"):
            assert loaded.tokenizer.encode(sample).ids == processor.encode(sample)


def test_tiktoken_and_vocab_with_merges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (tmp_path / "x.tiktoken").write_text("".join(lines))
    added = {"257": {"content": "<end>", "special": True}}
    tree = {"eos_token": "<end>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tree))
    loaded = load_tokenizer(Data(tokenizer=str(tmp_path)), 258)
    assert loaded.tokenizer.encode("abc é").ids == [256, *b"c \xc3\xa9"]
    assert loaded.end_of_text == 257
    assert "does not say how text is split" in caplog.text

    folder = tmp_path / "bpe"
    folder.mkdir()
    byte_texts = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: index for index, text in enumerate([*byte_texts, "ab", "<end>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    data = Data(tokenizer=str(folder), end_of_text="<end>")
    with pytest.raises(ConfigError, match=r"vocab\.json: how text is split is said by tokenizer_class"):
        load_tokenizer(data, 300)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<end>"}'
    )
    ids = load_tokenizer(data, 300).tokenizer.encode("ab c", add_special_tokens=False).ids
    assert ids == [vocab["ab"], vocab["Ġ"], vocab["c"]]
