"""What a folder of data may hold: read, named as not read, or refused; never silently left out."""

import bz2
import gzip
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.data import build, corpus, meta_file, metadata
from sffn_dist.data.prepare import prepare
from sffn_dist.data.sources import local, rows, source_of
from sffn_dist.data.sources import text as text_files
from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError, Data


def _read(source: object, **data: Any) -> list[str]:
    return list(corpus.documents(Data(source=str(source), **data)))


def _zstd(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return bytes(sink.getvalue().to_pybytes())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": _zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read(tmp_path: Path, suffix: str) -> None:
    """Two members one after the other are one file, as `cat a.gz b.gz` makes it."""
    compress = COMPRESS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(_lines(["é one"])) + compress(_lines(["two"])))
    (tmp_path / f"b.txt{suffix.upper()}").write_bytes(compress("naïve\r\ntext".encode()))
    (tmp_path / f"c.json{suffix}").write_bytes(compress(b'[{"text": "three"}]'))
    assert sorted(_read(tmp_path)) == ["naïve\ntext", "three", "two", "é one"]


def test_a_large_compressed_text_file_is_cut_as_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LARGE", 1000)
    monkeypatch.setattr(text_files, "PART", 100)
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    parts = _read(tmp_path / "b.txt.gz")
    assert parts == _read(tmp_path / "a.txt")
    assert "".join(parts) == text
    (tmp_path / "c.txt").write_text("x" * 2500)  # no line end at all
    assert [len(part) for part in _read(tmp_path / "c.txt")] == [1000, 1000, 500]


JSON_TEXTS = ["", "a", 'quote " \\ ] } , [ {', "é🙂\n", "x" * 300]


@pytest.mark.parametrize(
    "written",
    [
        lambda rows: json.dumps(rows),
        lambda rows: "\ufeff \n" + json.dumps(rows, indent=2) + "\n \n",
        lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
        lambda rows: "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows),
    ],
    ids=["array", "indented array", "lines", "objects"],
)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[Any], str], chunk: int
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    table = [{"n": {"deep": [1, 2.5e3, None, True]}, "text": text} for text in JSON_TEXTS]
    (tmp_path / "a.json").write_text(written(table), encoding="utf-8")
    assert _read(tmp_path) == JSON_TEXTS[1:]


@given(
    values=st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_json_values_in_chunks_are_what_json_reads_whole(values: list[Any], data: st.DataObject) -> None:
    text = json.dumps(values, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=False)
    size = data.draw(st.integers(1, 9))
    chunks = (text[start : start + size] for start in range(0, len(text), size))
    assert list(rows.json_values(chunks)) == values
    if cut := text[: data.draw(st.integers(1, len(text) - 1))]:
        with pytest.raises(rows.MalformedJSON):
            list(rows.json_values(iter([cut])))


def test_an_array_is_streamed(tmp_path: Path) -> None:
    """What is held of it is some rows, not the array."""
    from tracemalloc import get_traced_memory, start, stop

    with open(tmp_path / "a.json", "w") as file:
        file.write("[" + ",".join(json.dumps({"text": f"{i} " * 3000}) for i in range(1500)) + "]")
    size = (tmp_path / "a.json").stat().st_size
    start()
    count = sum(1 for _ in corpus.documents(Data(source=str(tmp_path))))
    peak = get_traced_memory()[1]
    stop()
    assert count == 1500
    assert size > 15e6
    assert peak < 8e6


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = "\ufeff"
    (tmp_path / "a.txt").write_text(mark + "a", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(mark + json.dumps({"text": "b"}), encoding="utf-8")
    (tmp_path / "c.json").write_text(mark + json.dumps([{"text": "c"}]), encoding="utf-8")
    assert sorted(_read(tmp_path)) == ["a", "b", "c"]


# ---------------------------------------------------------------------------------------------------- folders


def test_links_are_followed_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (inside / "sub" / "a.txt").write_text("a")
    (outside / "deep" / "b.txt").write_text("b")
    (inside / "0_first").symlink_to(inside / "sub")  # sorts before the folder itself
    (inside / "far").symlink_to(outside)
    (inside / "far again").symlink_to(outside / "deep")
    (outside / "up").symlink_to(outside)
    (inside / "sub" / "loop").symlink_to(inside)
    (inside / "sub" / "above").symlink_to(tmp_path)
    (inside / "latest.txt").symlink_to(inside / "sub" / "a.txt")
    assert sorted(_read(inside)) == ["a", "b"]
    found = local.listing(Data(source=str(inside)))
    assert {file.relative for file in found.files} == {"sub/a.txt", "far/deep/b.txt"}
    reasons = {item.relative: item.reason for item in found.not_read}
    assert reasons == {
        "0_first": "a folder that is read already under another name",
        "far again": "a folder that is read already under another name",
        "far/up": "a link to a folder above it",
        "sub/loop": "a link to a folder above it",
        "sub/above": "a link to a folder above it",
        "latest.txt": "a link to a file that is read already",
    }


def test_what_is_not_read_is_named(
    tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(_lines([f"some text {i}" for i in range(9)]))
    for name in ("README.md", "LICENSE", "x.py", ".hidden.txt", "y.py", "z.py"):
        (folder / name).write_text("x")
    contents = local.LocalFiles().contents(Data(source=str(folder)))
    assert contents == [
        "reads 1 .jsonl",
        "does not read 1 hidden: .hidden.txt",
        "does not read 5 not a format that is read: LICENSE, README.md, x.py, and 2 more",
    ]
    with caplog.at_level(logging.INFO):
        prepare(configure(folder))
    assert all(line in caplog.text for line in contents)


@pytest.mark.parametrize(
    "name", ["a.csv", "b.arrow", "c.parquet.gz", "d.tar.gz", "e.jsonl.lz4", "f.gz", "g.zip"]
)
def test_what_looks_like_data_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.jsonl").write_bytes(_lines(["a"]))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text("x")
    with pytest.raises(ConfigError) as caught:
        metadata.check_source(Data(source=str(tmp_path)))
    assert caught.match(rf"data\.source = .*looks like data and is not read: .*sub/{name}\. .*data\.ignore=")
    ignoring = Data(source=str(tmp_path), ignore=(f"*{Path(name).suffix}",))
    metadata.check_source(ignoring)
    assert ["data.ignore" in line for line in local.LocalFiles().contents(ignoring)] == [False, True]
    metadata.check_source(Data(source=str(tmp_path), ignore=("sub",)))


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes(_lines(["a"]))
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"1 a link to nothing: gone\.jsonl"):
        metadata.check_source(Data(source=str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens every folder")
def test_a_closed_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes(_lines(["a"]))
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ConfigError, match=r"a folder that cannot be opened \(Permission denied\): closed"):
        metadata.check_source(Data(source=str(tmp_path)))


def test_ignored_files_decide_the_folder(texts: Path, configure: Callable[..., Config]) -> None:
    base = metadata.locate(configure(texts))
    (texts / "more.csv").write_text("x")
    assert metadata.locate(configure(texts, ignore=["*.csv"])) == base
    assert metadata.locate(configure(texts, ignore=["*.csv", "0*"])) != base


def test_a_pattern_that_names_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(["a"]))
    (tmp_path / "b.csv").write_text("x")
    contents = local.LocalFiles().contents(Data(source=str(tmp_path), ignore=("*.csv", "*.tsv")))
    assert contents[1:] == [
        "does not read 1 data.ignore: b.csv",
        'holds nothing that data.ignore = "*.tsv" names',
    ]
    data = Data(ignore=("*.csv",))
    assert source_of(data.source).contents(data) == ["is no folder: data.ignore leaves nothing out"]


def test_patterns_come_from_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(
        json.dumps({"model": {"layers": 1, "width": 8, "heads": 2}, "train": {"steps": 1}})
    )
    got = loading.load(tmp_path / "c.json", ['data.ignore=["*.csv", "sub/*"]'])
    assert got.data.ignore == ("*.csv", "sub/*")


# --------------------------------------------------------------------------------------------------- bad rows


def _bad_folder(folder: Path) -> None:
    folder.mkdir()
    good = _lines([f"good text number {i}" for i in range(20)])
    (folder / "a.jsonl").write_bytes(
        good + b'{"text": 3}\n{"body": "x"}\n[1]\n{"text": "\xff"}\n{"text": "cut'
    )
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    (folder / "c.json").write_bytes(b'[{"text": "first"}, {"text": "se')
    (folder / "d.txt").write_bytes(b"one\ntwo\n\xff\n")
    (folder / "e.parquet").write_bytes(b"PAR1 nothing")


def test_bad_rows_are_named_before_anything_long(tmp_path: Path, configure: Callable[..., Config]) -> None:
    _bad_folder(tmp_path / "bad")
    config = configure(tmp_path / "bad")
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    *shown, last = caught.value.problems
    assert len(shown) == corpus.SHOWN
    assert last.startswith('data.bad_rows = "refuse": data.source has 9 bad rows, and ')
    assert "data.ignore" in last
    assert "data.bad_rows=skip" in last
    folder = metadata.locate(config)
    assert not folder.exists()
    assert not [path for path in folder.parent.iterdir() if path.suffix != ".lock"]


def test_the_check_comes_before_the_tokenizer(
    tmp_path: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn last line is seen before the first document is encoded."""
    (tmp_path / "rows.jsonl").write_bytes(_lines(["text"] * 50) + b'{"text": "to')
    monkeypatch.setattr(build, "train_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ConfigError, match=r"line 51 of .*rows\.jsonl is not JSON: .*seems to be cut off"):
        prepare(configure(tmp_path / "rows.jsonl"))


def test_a_misspelt_column_is_seen_early(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"body": "a"}] * 5000)
    with pytest.raises(ConfigError, match=r"must be a column of .*has: body \(line 1 of") as caught:
        corpus.check(Data(source=str(path)))
    assert "at least 100 bad rows" in caught.value.problems[-1]


def test_bad_rows_are_skipped_and_counted(
    tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    _bad_folder(tmp_path / "bad")
    config = configure(tmp_path / "bad", bad_rows="skip")
    meta = meta_file.read_meta(prepare(config))
    assert meta.skipped.bad_rows == 9
    kept = meta.train.documents + meta.heldout.documents
    assert kept == len(_read(tmp_path / "bad", bad_rows="skip"))
    assert (
        f"data.bad_rows = skip: skipped 9 bad rows, {kept} documents were kept (the first 5):" in caplog.text
    )
    assert metadata.locate(config) != metadata.locate(configure(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a.jsonl", r"line 21 of .*a\.jsonl"),
        ("b.jsonl.gz", r"line \d+ of .*b\.jsonl\.gz is cut off or damaged: .*nothing after it in this file"),
        ("c.json", r"row 2 of .*c\.json is not JSON: .*the file seems to be cut off"),
        ("d.txt", r"line 3 of .*d\.txt must be UTF-8 text"),
        ("e.parquet", r"e\.parquet cannot be read as parquet"),
    ],
)
def test_every_bad_row_says_where(tmp_path: Path, name: str, where: str) -> None:
    _bad_folder(tmp_path / "bad")
    with pytest.raises(ConfigError, match=where) as caught:
        _read(tmp_path / "bad" / name)
    assert "data.bad_rows=skip" in str(caught.value)


@pytest.mark.parametrize(("name", "form"), [("a.jsonl", "%s\n%s\n"), ("a.json", "[%s, %s]")])
def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / name).write_text(form % ('{"text": "kept"}', '{"text": "first", "text": "second"}'))
    with pytest.raises(ConfigError, match=rf"(line|row) 2 of .*{name} holds a key twice"):
        _read(tmp_path)
    assert _read(tmp_path, bad_rows="skip") == ["kept"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_cut_off_stream_keeps_what_came_before(tmp_path: Path, suffix: str) -> None:
    texts = [os.urandom(300).hex() for _ in range(2000)]  # more than one block of any of them
    raw = COMPRESS[suffix](_lines(texts))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(raw[: len(raw) * 4 // 5])
    passed = corpus.Passed()
    kept = list(corpus.documents(Data(source=str(tmp_path), bad_rows="skip"), passed))
    assert kept == texts[: len(kept)]
    assert passed.bad_rows == 1
    assert f"line {len(kept) + 1} of " in passed.shown[0]
    assert len(kept) > 0 or suffix == ".bz2"


def test_empty_files_are_skipped_with_a_notice(
    tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    pq.write_table(pa.table({"text": [f"some text {i}" for i in range(30)]}), folder / "a.parquet")
    pq.write_table(pa.table({"other": pa.array([], pa.string())}), folder / "no_rows.parquet")
    for name in ("zero.parquet", "zero.jsonl", "zero.txt", "zero.json", "zero.jsonl.zst"):
        (folder / name).write_bytes(b"")
    (folder / "blank.jsonl").write_bytes(b"\n\n")
    (folder / "none.json").write_bytes(b"[]")
    meta = meta_file.read_meta(prepare(configure(folder)))
    assert meta.train.documents + meta.heldout.documents == 30
    (line,) = [line for line in caplog.messages if "hold no row and no text" in line]
    assert line.startswith("8 files hold no row and no text: ")
    assert meta.skipped.bad_rows == 0


def test_empty_documents_are_counted(
    tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    rows_ = [{"text": ""}, {"text": None}, *({"text": f"some text {i}"} for i in range(9))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    meta = meta_file.read_meta(prepare(configure(tmp_path / "rows.jsonl")))
    assert meta.skipped.empty_documents == 2
    assert "skipped 2 empty documents" in caplog.text


def test_rows_of_many_bytes_are_read_fewer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 rows of 1 MB, of which 2 MB are asked for at a time, not 60 MB."""
    table = pa.table({"text": [os.urandom(500_000).hex() for _ in range(60)]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    del table
    monkeypatch.setattr(rows, "BATCH_BYTES", 2_000_000)
    pool = pa.system_memory_pool()
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        held = max(pool.bytes_allocated() for _ in corpus.documents(Data(source=str(tmp_path))))
    finally:
        pa.set_memory_pool(before)
    assert held < 12_000_000


def test_a_long_document_shows_progress(
    tmp_path: Path,
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the characters encoded: its bytes are counted only at its end."""
    (tmp_path / "one.jsonl").write_bytes(_lines(["some words and more words\n" * 12_000]))
    monkeypatch.setattr(build, "BATCH", 1)
    monkeypatch.setattr(build, "_NEWS", 0.0)
    monkeypatch.setattr(build, "pieces", lambda text: iter([text[:100_000], text[100_000:]]))
    with caplog.at_level(logging.INFO):
        prepare(configure(tmp_path / "one.jsonl"))
    first = next(line for line in caplog.messages if line.startswith("encoded "))
    assert first.startswith("encoded 0 documents and what is done of the next, 0.1 M characters, ")


# ------------------------------------------------------------------------------------------------ separators

END = "<|endoftext|>"


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_separators_end_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    stories = ["once\nupon", "  a time", "x"]
    (tmp_path / "a.txt").write_text(f"\n{END}\n".join(stories) + f"\n{END}\n")
    (tmp_path / "b.txt").write_text(f"{END}{END}".join(stories))
    passed = corpus.Passed()
    assert list(corpus.documents(Data(source=str(tmp_path / "a.txt")), passed)) == stories
    assert passed.empty_documents == 0
    assert list(corpus.documents(Data(source=str(tmp_path / "b.txt")), passed)) == stories
    assert passed.empty_documents == 2
    (whole,) = _read(tmp_path / "a.txt", document_separator=None)
    assert whole == (tmp_path / "a.txt").read_text()
    assert _read(tmp_path / "a.txt", document_separator="upon") == [
        "once",
        whole.partition("upon")[2].lstrip("\n"),
    ]


def test_separators_in_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LARGE", 1000)
    monkeypatch.setattr(text_files, "PART", 100)
    stories = ["".join(f"line {i} of {n}\n" for i in range(n % 20)) + "end" for n in range(1, 60)]
    (tmp_path / "a.txt").write_text(END.join(stories))
    found = []
    for chunk in (3, 64, 1 << 20):
        monkeypatch.setattr(text_files, "CHUNK", chunk)
        found.append(_read(tmp_path))
    assert found[0] == found[1] == found[2]
    assert "".join(found[0]) == "".join(stories)
    assert max(map(len, found[0])) < 130
    assert len(found[0]) > len(stories)


def test_the_separator_becomes_an_end_of_text(
    tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    from sffn_dist.data.shards import open_corpus

    (tmp_path / "a.txt").write_text(END.join(f"story {i}" for i in range(40)))
    opened = open_corpus(prepare(configure(tmp_path / "a.txt")))
    assert opened.meta.train.documents + opened.meta.heldout.documents == 40
    assert int((opened.train[:] == 0).sum() + (opened.heldout[:] == 0).sum()) == 40
    assert END not in caplog.text
    config = configure(tmp_path / "a.txt", document_separator=None)
    assert prepare(config) != opened.folder
    assert f"1 documents hold the text {END!r}: it is encoded as ordinary text" in caplog.text


def test_half_a_surrogate_pair_is_said(
    tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "half \\ud83d"}\n' + '{"text": "some text"}\n' * 9)
    prepare(configure(tmp_path / "rows.jsonl"))
    assert "1 documents hold half a surrogate pair" in caplog.text
