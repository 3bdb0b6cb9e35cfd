"""Prepared once, whole or not at all."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from sffn_dist.data import build, meta_file, metadata
from sffn_dist.data.prepare import prepare
from sffn_dist.data.shards import Corpus, open_corpus, verify
from sffn_dist.launch import claim, run_identity
from sffn_dist.spec.config import Config, ConfigError

PREPARER = """
import errno, fcntl, json, logging, os, sys, time
def flock(file, operation):
    if sys.argv[3] == "missing":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
if sys.argv[3] != "real":
    fcntl.flock = flock  # "local": says yes to everybody
logging.basicConfig(level=logging.INFO, format="%(message)s")
from sffn_dist.spec.loading import from_tree
from sffn_dist.data import build
from sffn_dist.data.prepare import prepare
go_on, describe = sys.argv[2], build._describe

def slowly(*arguments):
    print("inside", flush=True)
    while not os.path.exists(go_on):
        time.sleep(0.02)
    return describe(*arguments)
build._describe = slowly
print(prepare(from_tree(json.loads(sys.argv[1]))), flush=True)
"""


def bytes_of(corpus: Corpus, tokens: np.ndarray) -> int:
    """Bytes of text that an array of tokens stands for."""
    return int(corpus.token_bytes[tokens].sum(dtype=np.int64))


def _start(config: Config, go_on: Path, flock: str = "real", before: str = "") -> subprocess.Popen[str]:
    """A preparer that waits for the file ``go_on`` before it describes what it wrote.

    ``flock``: real, missing (ENOSYS) or local. ``before``: code that it runs first.
    """
    tree = json.dumps(config.model_dump(mode="json"))
    arguments = [sys.executable, "-c", before + PREPARER, tree, str(go_on), flock]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_until_inside(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "inside"


def test_a_corpus_is_what_its_meta_says(texts: Path, configure: Callable[..., Config]) -> None:
    config = configure(texts, heldout_share=0.3)
    folder = prepare(config)
    assert folder == metadata.locate(config)
    verify(folder)
    corpus, meta = open_corpus(folder), meta_file.read_meta(folder)
    assert len(corpus.train) == meta.train.tokens
    assert len(corpus.heldout) == meta.heldout.tokens
    assert (meta.dtype, meta.byte_exact, meta.end_of_text, meta.vocab) == ("uint16", True, 0, 300)
    found: dict[str, list[str]] = {}
    for side, stream, split in (
        ("train", corpus.train, meta.train),
        ("heldout", corpus.heldout, meta.heldout),
    ):
        text = corpus.tokenizer.decode(stream[:].tolist(), skip_special_tokens=False)
        *found[side], rest = text.split("<|endoftext|>")
        assert rest == ""
        assert len(found[side]) == split.documents > 5
        assert bytes_of(corpus, stream[:]) == split.bytes == sum(len(one.encode()) for one in found[side])
        assert all(build.is_heldout(one.encode(), 0.3) == (side == "heldout") for one in found[side])
    assert sorted(found["train"] + found["heldout"]) == sorted(
        path.read_text(encoding="utf-8") for path in texts.iterdir()
    )
    counts = np.bincount(corpus.heldout[:])
    share = counts[counts > 0] / counts.sum()
    assert meta.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())


def test_prepared_once_and_the_same_elsewhere(
    texts: Path, tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config = configure(texts)
    folder = prepare(config)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(config) == folder
    assert times == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    other = prepare(configure(texts, dir=str(tmp_path / "elsewhere")))
    assert other.name == folder.name
    assert meta_file.read_meta(other).fingerprint == meta_file.read_meta(folder).fingerprint


def test_what_decides_the_content_decides_the_folder(texts: Path, configure: Callable[..., Config]) -> None:
    base = metadata.locate(configure(texts))
    assert metadata.locate(configure(texts, sequence=99)) == base
    assert metadata.locate(configure(texts, text_field="body")) == base  # .txt has no columns
    others = [
        metadata.locate(configure(texts, vocab=301)),
        metadata.locate(configure(texts, heldout_share=0.5)),
    ]
    path = texts / "00.txt"
    path.write_text(path.read_text().replace("fox", "cat"))
    os.utime(path, ns=(1, 1))
    others.append(metadata.locate(configure(texts)))
    (texts / "rows.jsonl").write_text("{}")
    others += [metadata.locate(configure(texts)), metadata.locate(configure(texts, text_field="body"))]
    assert len({base, *others}) == 6


def test_what_is_put_around_documents_decides_the_folder(
    texts: Path, tmp_path: Path, configure: Callable[..., Config]
) -> None:
    """A corpus keeps the name that earlier versions gave it, which took the first token of their own list."""
    vocab = {"[UNK]": 0, "fox": 1, "</s>": 2, "<stop>": 3}
    Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    alone = configure(texts, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"data\.end_of_text = null"):
        metadata.locate(alone)
    named = configure(texts, tokenizer=str(tmp_path), end_of_text="</s>")
    earlier = prepare(named)
    assert metadata.locate(alone) == earlier, (
        "what is prepared serves, though nothing says what ended documents"
    )
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    assert metadata.locate(alone) == earlier
    with_bos = configure(texts, tokenizer=str(tmp_path), bos=True)
    assert metadata.locate(with_bos) != earlier
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert metadata.locate(alone) != earlier
    with pytest.raises(ConfigError, match=r"data\.bos = true: .*no file beside it says bos_token"):
        metadata.locate(with_bos)
    assert metadata.locate(configure(texts, end_of_text="<end>")) != metadata.locate(configure(texts))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_content_decides_not_place_or_time(
    texts: Path, tmp_path: Path, configure: Callable[..., Config], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touched, moved and copied without times: the corpus that is there serves. Another word in a file of the
    same size does not pass.
    """
    source = texts if kind == "folder" else texts / "05.txt"
    folder = prepare(configure(source))
    os.utime(texts / "05.txt", ns=(5, 5))
    assert prepare(configure(source)) == folder
    moved = source.rename(tmp_path / ("elsewhere" if kind == "folder" else "other.txt"))
    file = moved / "05.txt" if kind == "folder" else moved
    assert prepare(configure(moved)) == folder
    with monkeypatch.context() as patch:  # found once, it is not read again
        patch.setattr(metadata, "content_digest", lambda files: 1 / 0)
        assert prepare(configure(moved)) == folder
    assert metadata.locate(configure(moved, heldout_share=0.5)) != folder
    file.write_text(file.read_text(encoding="utf-8").replace("fox", "cat"), encoding="utf-8")
    assert metadata.locate(configure(moved)) != folder


def test_a_run_goes_on_with_its_data_elsewhere(
    texts: Path, tmp_path: Path, configure: Callable[..., Config]
) -> None:
    """run.json names a path; what is compared is the fingerprint, before and after preparation."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def of(config: Config) -> Config:
        return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run_dir)})})

    config = of(configure(texts))
    run_identity.write_record(config, meta_file.read_meta(prepare(config)).fingerprint)
    moved = of(configure(texts.rename(tmp_path / "moved")))
    run_identity.check_identity(moved)  # not known yet
    fingerprint = meta_file.read_meta(prepare(moved)).fingerprint
    run_identity.check_identity(moved, fingerprint)
    with pytest.raises(ConfigError, match=r"data\.source = .*moved.* was trained on other data"):
        run_identity.check_identity(moved, fingerprint[::-1])
    with pytest.raises(ConfigError, match=r'data\.source = "stdlib": .* holds a run with'):
        run_identity.check_identity(of(configure("stdlib")))
    with pytest.raises(ConfigError, match=r"data\.heldout_share = 0\.5"):
        run_identity.check_identity(of(configure(tmp_path / "moved", heldout_share=0.5)), fingerprint)


def test_prepared_shards_suffice_where_the_text_is_gone(
    texts: Path, tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    """And where the tokenizer's file is; with other settings the missing source is refused as ever."""
    Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
    config = configure(texts)
    given = configure(texts, tokenizer=str(tmp_path / "t.json"), end_of_text="</s>")
    folders = prepare(config), prepare(given)
    texts.rename(tmp_path / "gone")
    (tmp_path / "t.json").unlink()
    with caplog.at_level(logging.INFO):
        assert (prepare(config), prepare(given)) == folders
    assert f"{folders[0]}, which was prepared from it, suffices" in caplog.text
    for other in (configure(texts, vocab=301), configure(texts, heldout_share=0.5)):
        with pytest.raises(ConfigError, match=r"data\.source = .*there is no such file or folder"):
            prepare(other)


def test_several_shards(texts: Path, tmp_path: Path, configure: Callable[..., Config]) -> None:
    config = configure(texts)
    one = open_corpus(prepare(config))
    folder = tmp_path / "several"
    folder.mkdir()
    meta = build.build(config, folder, "several", shard_tokens=1000)
    assert len(meta.train.shards) > 3
    assert np.array_equal(open_corpus(folder).train[:], one.train[:])


@pytest.mark.parametrize(
    ("share", "documents"), [(1e-9, 4), (1 - 1e-9, 4), (1e-9, 1), (1 - 1e-9, 1), (0.25, 1)]
)
def test_no_side_is_ever_empty(
    tmp_path: Path, configure: Callable[..., Config], share: float, documents: int
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(documents):
        (folder / f"{index}.txt").write_text(f"{index} é some words\n" * 40, encoding="utf-8")
    corpus = open_corpus(prepare(configure(folder, heldout_share=share)))
    train, heldout = corpus.meta.train, corpus.meta.heldout
    assert bytes_of(corpus, corpus.train[:]) == train.bytes
    assert bytes_of(corpus, corpus.heldout[:]) == heldout.bytes
    assert corpus.meta.byte_exact
    assert train.bytes + heldout.bytes == sum(path.stat().st_size for path in folder.iterdir())
    if documents > 1:
        assert sorted((train.documents, heldout.documents)) == [1, documents - 1]
    if share == 0.25:
        assert heldout.tokens == pytest.approx(0.25 * (train.tokens + heldout.tokens), abs=1)
    assert corpus.train[-1] == 0 or documents == 1
    assert corpus.heldout[-1] == 0 or documents == 1


def test_a_vocabulary_over_65536_is_kept_whole(
    texts: Path, tmp_path: Path, configure: Callable[..., Config]
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 69_999, "fox": 65_540, "</s>": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    corpus = open_corpus(
        prepare(configure(texts, vocab=70_000, tokenizer=str(tmp_path / "t.json"), end_of_text="</s>"))
    )
    assert (corpus.meta.dtype, corpus.meta.vocab, corpus.meta.byte_exact) == ("uint32", 70_000, False)
    assert set(np.unique(corpus.train[:]).tolist()) == {4, 65_540, 69_999}


@pytest.mark.parametrize("flock", ["real", "missing", "local"])
def test_the_second_waits_for_the_first(
    texts: Path, tmp_path: Path, configure: Callable[..., Config], flock: str
) -> None:
    config, go_on = configure(texts), tmp_path / "go on"
    first = _start(config, go_on, flock)
    _wait_until_inside(first)
    second = _start(config, go_on, flock)
    assert second.stderr is not None
    told = second.stderr.readline()
    assert told.startswith("waiting for another process")
    go_on.touch()
    out, rest = second.communicate(timeout=120)
    first_out, first_told = first.communicate(timeout=120)
    assert first.returncode == second.returncode == 0
    assert out == first_out == f"{metadata.locate(config)}\n"  # the second never came "inside"
    assert rest == ""
    assert "preparing data.source" in first_told


def test_killed_in_the_middle(
    texts: Path, tmp_path: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(texts)
    folder = metadata.locate(config)
    process = _start(config, tmp_path / "never")
    _wait_until_inside(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not folder.exists()
    (left,) = folder.parent.glob(f".{folder.name}.*.tmp")
    other = configure(texts, vocab=301)  # even one who prepares another corpus clears away what is dead
    with caplog.at_level(logging.INFO):
        prepare(other)
    assert "left by a preparation that did not end" in caplog.text
    assert not left.exists()
    verify(prepare(config))
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


BLIND = """
from sffn_dist.launch.claim import Claim
Claim.try_take = lambda self: None  # as where a file made on one machine is not seen on the other
"""


def test_who_loses_the_race_uses_what_the_winner_published(
    texts: Path, tmp_path: Path, configure: Callable[..., Config]
) -> None:
    config, go_on = configure(texts), tmp_path / "go on"
    racers = [_start(config, go_on, "local", before=BLIND) for _ in range(2)]
    for racer in racers:
        _wait_until_inside(racer)  # both are writing the same corpus
    go_on.touch()
    told = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], told
    folder = metadata.locate(config)
    assert [out for out, _ in told] == [f"{folder}\n"] * 2
    assert sum("another process has prepared" in err for _, err in told) <= 1
    verify(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_loser_replaces_only_what_is_broken(
    texts: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(texts)
    folder, original = metadata.locate(config), build.build
    for damaged in (False, True):
        whole = folder.parent.parent / f"whole {damaged}"

        def build_after_another(*arguments: Any, damaged: bool = damaged, whole: Path = whole) -> Any:
            shutil.copytree(whole, folder)
            if damaged:
                (folder / "train-00000.bin").write_bytes(b"other")
            return original(*arguments)

        prepare(config).rename(whole)
        with monkeypatch.context() as patch:
            patch.setattr(build, "build", build_after_another)
            assert prepare(config) == folder
        verify(folder)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        shutil.rmtree(folder)


def test_only_what_reads_back_is_published(
    texts: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, original = configure(texts), build.build

    def build_on_a_bad_disk(config: Config, folder: Path, name: str) -> meta_file.Meta:
        meta = original(config, folder, name)
        with open(folder / "train-00000.bin", "r+b") as file:
            file.write(b"\x07")
        return meta

    monkeypatch.setattr(build, "build", build_on_a_bad_disk)
    with pytest.raises(meta_file.CorpusError, match=r"train-00000\.bin is damaged"):
        prepare(config)
    assert not list(metadata.locate(config).parent.iterdir())


def test_the_sweep_leaves_what_may_be_alive(
    texts: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(texts)
    data_dir = metadata.locate(config).parent
    far = dataclasses.replace(claim.Holder.here(), machine="another machine", host="far")
    leftovers = {}
    for name, seconds in (("far alive", 30), ("far dead", 1000), ("nameless", 1000), ("nameless old", 1e6)):
        leftovers[name] = data_dir / f".{name}.tmp"
        leftovers[name].mkdir(parents=True)
        file = leftovers[name] / ("preparer" if name.startswith("far") else "train-00000.bin")
        file.write_bytes(far.line())
        for path in (file, leftovers[name]):
            os.utime(path, times=(time.time() - seconds, time.time() - seconds))
    prepare(config)
    assert {name for name, path in leftovers.items() if path.exists()} == {"far alive", "nameless"}


def test_an_error_leaves_nothing(
    texts: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(texts)
    monkeypatch.setattr(build, "balance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config)
    monkeypatch.undo()
    assert not list(metadata.locate(config).parent.iterdir())
    verify(prepare(config))


@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_meta_is_never_believed(meta_text: tuple[Path, str], data: st.DataObject) -> None:
    folder, text = meta_text
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["change", "remove", "cut"]))
        if kind == "change":
            raw[place] = data.draw(st.integers(0, 255))
        elif kind == "remove" and len(raw) > 1:
            del raw[place]
        else:
            raw = raw[: max(1, place)]
    (folder / "meta.json").write_bytes(raw)
    try:
        read = meta_file.read_meta(folder)
    except meta_file.CorpusError:
        return
    (folder / "meta.json").write_text(text)
    assert read == meta_file.read_meta(folder)  # white space


@pytest.fixture
def meta_text(texts: Path, configure: Callable[..., Config]) -> tuple[Path, str]:
    folder = prepare(configure(texts))
    return folder, (folder / "meta.json").read_text()


@pytest.mark.parametrize(
    "damage", ["meta", "no meta", "short shard", "long shard", "no shard", "no tokenizer", "no bytes"]
)
def test_a_damaged_folder_is_refused_and_prepared_again(
    texts: Path, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = configure(texts)
    folder = prepare(config)
    before = meta_file.read_meta(folder).fingerprint
    shard = folder / "train-00000.bin"
    if damage == "meta":
        (folder / "meta.json").write_text('{"meta": {}, "checksum": ""}')
    elif damage == "short shard":
        os.truncate(shard, shard.stat().st_size - 2)
    elif damage == "long shard":
        os.truncate(shard, shard.stat().st_size + 2)
    else:
        names = {
            "no meta": "meta.json",
            "no shard": shard.name,
            "no tokenizer": "tokenizer.json",
            "no bytes": "token_bytes.npy",
        }
        (folder / names[damage]).unlink()
    with pytest.raises(meta_file.CorpusError, match=str(folder)):
        open_corpus(folder)
    assert prepare(config) == folder
    assert "cannot be used" in caplog.text
    verify(folder)
    assert meta_file.read_meta(folder).fingerprint == before


def test_verify_reads_what_sizes_do_not_show(texts: Path, configure: Callable[..., Config]) -> None:
    folder = prepare(configure(texts))
    with open(folder / "train-00000.bin", "r+b") as file:
        file.write(b"\x07")
    with pytest.raises(meta_file.CorpusError, match=r"train-00000\.bin is damaged"):
        verify(folder)
