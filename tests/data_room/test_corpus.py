"""Sources -> documents, and every way a source can be bad."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sffn_dist.data import corpus, metadata
from sffn_dist.data.prepare import prepare
from sffn_dist.data.sources import stdlib
from sffn_dist.data.sources import text as text_files
from sffn_dist.data.sources.files import in_reading_order
from sffn_dist.spec.config import Config, ConfigError, Data


def _read(source: object, **settings: Any) -> list[str]:
    return list(corpus.documents(Data(source=str(source), **settings)))


def test_text_files_whatever_their_names(tmp_path: Path) -> None:
    names = ["a[1].txt", "b*.txt", "c d.TXT", "deep/__x__/e.txt", ".hidden.txt", "other.md"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "empty.txt").write_text("")
    assert sorted(_read(tmp_path)) == sorted(names[:4])
    assert _read(tmp_path) == _read(tmp_path)


def test_a_large_text_file_becomes_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LARGE", 1000)
    monkeypatch.setattr(text_files, "PART", 100)
    text = "".join(f"line {i}\n" for i in range(500)) + "no line end"
    (tmp_path / "big.txt").write_text(text)
    parts = _read(tmp_path)
    assert "".join(parts) == text
    assert all(100 <= len(part) < 120 for part in parts[:-1])


def test_jsonl_rows_need_no_common_schema(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(
        [
            {"text": "a\nb", "id": 1},
            {"text": None, "id": "x"},
            {"id": {}, "text": "é", "more": [1]},
            {"text": ""},
        ]
    )
    assert _read(path) == ["a\nb", "é"]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["three"], "n": ["x"]}), tmp_path / "b.parquet")
    assert sorted(_read(tmp_path, text_field="body")) == ["one", "three", "two"]
    with pytest.raises(ConfigError, match=r'data\.text_field = "text": must be a column of .*has: body, n'):
        _read(tmp_path)
    with pytest.raises(
        ConfigError, match=r'data\.text_field = "n": must be a column of text; a row holds a int'
    ):
        _read(tmp_path / "a.parquet", text_field="n")


def test_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*names: Any, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        return datasets.Dataset.from_dict({"text": ["a", "", "b"], "n": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _read("hf:some/name:part") == ["a", "b"]
    assert asked == [("some/name", "part", "train")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match=r'data\.source = "hf:x": cannot be read: ZeroDivisionError'):
        _read("hf:x")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b'{"text": "a"}\n{"tex', r"line 2 of .*rows\.jsonl is not JSON"),
        (b"[1]\n", r"line 1 of .*rows\.jsonl must hold a JSON object"),
        (b'{"text": "\xff"}\n', r"must be UTF-8 text"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: bytes, rule: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data\.source = .*{rule}"):
        _read(tmp_path)


def test_bad_columns_are_named(write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(
        ConfigError, match=r'data\.text_field = "text": must be a column of data\.source = .*has: body'
    ):
        _read(write_jsonl([{"body": "a"}]))
    with pytest.raises(
        ConfigError, match=r'data\.text_field = "text": must be a column of text; a row holds a int'
    ):
        _read(write_jsonl([{"text": 3}]))


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ConfigError, match=r"data\.source = .*cannot be read"):
        _read(tmp_path)


def test_bad_sources_are_refused_cheaply(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "folder").mkdir()
    cases = {
        "nowhere": "there is no such file or folder",
        "": "there is no such file or folder",
        str(tmp_path / "a.md"): r"this file's name ends in '\.md'",
        str(tmp_path / "folder"): "this folder holds no such file",
        "hf:": "the dataset's name is missing",
    }
    for source, rule in cases.items():
        with pytest.raises(ConfigError) as caught:
            metadata.check_source(Data(source=source))
        assert caught.match(rule)
        assert str(caught.value).startswith(f"data.source = {json.dumps(source)}: must be")
    with pytest.raises(
        ConfigError,
        match=r'data\.tokenizer = "none\.json": must be a folder, or a file, of .*; there is no',
    ):
        metadata.check_source(Data(tokenizer="none.json"))
    with pytest.raises(ConfigError, match=r"model\.vocab = 256: must be at least 257"):
        metadata.check_source(Data(), 256)
    with pytest.raises(ConfigError) as caught:
        metadata.check_source(Data(source="nowhere", tokenizer="none.json"), 10)
    assert len(caught.value.problems) == 2
    metadata.check_source(Data())


def test_no_text_and_no_place_are_refused(
    tmp_path: Path, texts: Path, configure: Callable[..., Config]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"data\.source = .*must hold text; every document in it is empty"):
        prepare(configure(tmp_path / "empty"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.dir = .*file: File exists; it is a file"):
        prepare(configure(texts, dir=str(tmp_path / "file")))


def test_locating_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sffn_dist.spec.config import Data; from sffn_dist.data import metadata, prepare; "
        "metadata.check_source(Data());"
        "print([m for m in ('numpy', 'torch', 'datasets', 'tokenizers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def test_the_standard_library_is_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configure: Callable[..., Config]
) -> None:
    from sffn_dist.data.shards import open_corpus, verify

    files = in_reading_order(stdlib.files())
    assert len(files) > 500
    assert not [file for file in files if "site-packages" in file.relative or "__pycache__" in file.relative]
    some = files[:60]
    monkeypatch.setattr(stdlib, "files", lambda: iter(some))
    folder = prepare(configure("stdlib", vocab=600))
    verify(folder)
    opened = open_corpus(folder)
    meta = opened.meta
    readable = [file for file in some if file.size and _is_utf8(file.path)]
    assert meta.train.documents + meta.heldout.documents == len(readable)
    text = opened.tokenizer.decode(opened.train[:].tolist(), skip_special_tokens=False)
    documents = {file.path.read_text(encoding="utf-8") for file in readable}
    assert set(text.split("<|endoftext|>")) - {""} <= documents | {""} or any(
        "<|endoftext|>" in d for d in documents
    )
    assert 0 < meta.unigram_entropy < 6.4
