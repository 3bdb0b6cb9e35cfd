"""Bytes of source text that tokens stand for: exact whatever the tokenizer normalizes, drops or splits."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sffn_dist.data import meta_file
from sffn_dist.data.byte_counts import counting, source_bytes
from sffn_dist.data.prepare import prepare
from sffn_dist.data.shards import TokenStream, open_corpus, verify
from sffn_dist.spec.config import Config

AWKWARD = (
    "The ﬁrst ½ of cafe\u0301, naïve;  two  spaces\tand tabs \n",
    "東京タワー 你好 мир 🙂👩\u200d💻 \uff21\uff22 e\u0301\n",
    "   leading and trailing   ",
    "e\u0301\u0301 o\u0308\u00a0x\u2003y\r\n",
    "",
)  # fmt: skip


def _tokenizer_of(kind: str) -> Tokenizer:
    """Small real tokenizers: a normalizer, white space that is dropped, bytes of unknown characters."""
    if kind == "unigram, NFKC, Metaspace":
        pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
        pieces += [
            (text, -2.0) for text in ("▁", "▁the", "▁fi", "rst", "a", "e", "n", "o", "r", "t", "s", "1", "2")
        ]
        made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
        steps = [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        made.normalizer = normalizers.Sequence(steps)
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    elif kind == "BPE, byte fallback, prefix":
        letters = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
        letters |= {text: 258 + n for n, text in enumerate(("▁", "t", "h", "e", "th", "▁th"))}
        merges = [("t", "h"), ("▁", "th")]
        made = Tokenizer(models.BPE(letters, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(prefix)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        vocab = {text: n for n, text in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        made = Tokenizer(models.BPE(vocab, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte-level, prefix")
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=True)
        if kind == "byte-level, NFC":
            made.normalizer = normalizers.NFC()
    made.add_special_tokens(["</s>"])
    return made


KINDS = ("unigram, NFKC, Metaspace", "BPE, byte fallback, prefix", "byte-level, NFC", "byte-level, prefix")


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(deadline=None, max_examples=60)
def test_the_tokens_of_a_text_stand_for_its_bytes(kind: str, text: str) -> None:
    """Their sum is the text's length, and up to a token that ends a character, that of the text so far."""
    exact = counting(_tokenizer_of(kind))
    for sample in (text, *AWKWARD):
        encoding = exact.encode(sample, add_special_tokens=False)
        counts, rest = source_bytes(sample, encoding.offsets, carried=5)
        assert counts.sum() + rest == len(sample.encode()) + 5
        assert len(counts) == len(encoding.ids)
        furthest = 0
        for place, (_, end) in enumerate(encoding.offsets, start=1):
            furthest = max(furthest, end)
            assert counts[:place].sum() == len(sample[:furthest].encode()) + 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [30, 2, 1])
def test_bytes_of_heldout_text_are_exact(
    tmp_path: Path, configure: Callable[..., Config], kind: str, documents: int
) -> None:
    """Of the whole held-out side, and of the windows that an evaluation takes."""
    _tokenizer_of(kind).save(str(tmp_path / "t.json"))
    texts = [f"{n} " + AWKWARD[n % 4] * (3 + n % 3) for n in range(documents)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given_tokenizer = {"tokenizer": str(tmp_path / "t.json"), "end_of_text": "</s>"}
    for share in (0.3, 1e-9, 1 - 1e-9):
        corpus = open_corpus(prepare(configure(rows, heldout_share=share, **given_tokenizer)))
        verify(corpus.folder)
        meta = corpus.meta
        assert not meta.byte_exact
        assert meta.train.bytes + meta.heldout.bytes == sum(len(text.encode()) for text in texts)
        split = meta.heldout.model_copy(update={"shards": meta.heldout_bytes})
        counts = TokenStream(corpus.folder, split, np.dtype(meta_file.BYTES_TYPE))
        assert counts[:].sum() == meta.heldout.bytes
        if meta.heldout.tokens < 5:
            continue  # of the only document
        sample = corpus.heldout_sample(sequence=4, count=3)
        last = len(sample.windows) - 1
        places = [n * ((len(counts) - 1) // 4) // min(3, (len(counts) - 1) // 4) for n in range(last + 1)]
        assert sample.text_bytes == sum(int(counts[4 * n + 1 : 4 * n + 5].sum()) for n in places)
        assert not sample.estimated


def test_white_space_counts_with_its_own_token() -> None:
    """Though a post-processor trims it off the offsets."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "aĠ": 3}, [("a", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer.encode("a b").offsets == [(0, 1), (2, 3)]
    assert source_bytes("a b", counting(tokenizer).encode("a b").offsets)[0].tolist() == [2, 1]


def test_bytes_between_the_pieces_of_a_long_document_are_counted(
    tmp_path: Path, configure: Callable[..., Config]
) -> None:
    """The first piece ends in white space that the tokenizer drops."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))
    row = json.dumps({"text": "word " * 150_000 + "\n" * 400_000 + "end"})
    (tmp_path / "long.jsonl").write_text(row + "\n" + json.dumps({"text": "other"}) + "\n")
    named = {"tokenizer": str(tmp_path / "t.json"), "end_of_text": "</s>", "heldout_share": 1 - 1e-9}
    corpus = open_corpus(prepare(configure(tmp_path / "long.jsonl", **named)))
    split = corpus.meta.heldout.model_copy(update={"shards": corpus.meta.heldout_bytes})
    counts = TokenStream(corpus.folder, split, np.dtype(meta_file.BYTES_TYPE))[:]
    assert counts.sum() == corpus.meta.heldout.bytes == 750_000 + 400_000 + 3
    assert counts.max() > 300_000, "what is dropped counts with the token after it"


def test_a_corpus_of_an_earlier_version_gives_an_estimate(
    texts: Path, tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    _tokenizer_of("byte-level, NFC").save(str(tmp_path / "t.json"))
    config = configure(texts, tokenizer=str(tmp_path / "t.json"), end_of_text="</s>")
    folder = prepare(config)
    meta = meta_file.read_meta(folder)
    for shard in meta.heldout_bytes:
        (folder / shard.file).unlink()
    earlier = meta.model_copy(update={"heldout_bytes": ()})
    (folder / "meta.json").write_text(meta_file.dump_meta(earlier))
    assert prepare(config) == folder
    assert "bits per byte are an estimate" in caplog.text
    assert open_corpus(folder).heldout_sample(4, 3).estimated
    assert not open_corpus(prepare(configure(texts))).heldout_sample(4, 3).estimated
