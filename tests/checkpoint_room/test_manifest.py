"""The manifest: a folder is a complete checkpoint or it is BrokenCheckpoint, whatever happened to its
files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.checkpoint.manifest import (
    FORMAT,
    NAME,
    VERSION,
    BrokenCheckpoint,
    Manifest,
    Piece,
    missing_tensors,
    seal,
)

TREE: dict[str, Any] = {
    "format": FORMAT,
    "version": VERSION,
    "step": 120,
    "optimizer_steps": 118,
    "tensor_parallel": 2,
    "guide_optimizer_steps": None,
    "kinds": ["weight", "exp_avg", "exp_avg_sq"],
    "files": {
        "rank_00000.safetensors": {"bytes": 10, "sha256": hashlib.sha256(b"x" * 10).hexdigest()},
        "rank_00001.safetensors": {"bytes": 4, "sha256": hashlib.sha256(b"x" * 4).hexdigest()},
    },
    "tensors": {
        "embedding.weight": {
            "shape": [6, 2],
            "pieces": [
                {"tensor_rank": 0, "start": 0, "numel": 6, "file": "rank_00000.safetensors"},
                {"tensor_rank": 1, "start": 0, "numel": 6, "file": "rank_00001.safetensors"},
            ],
        },
        "norm.weight": {
            "shape": [2],
            "pieces": [{"tensor_rank": 0, "start": 0, "numel": 2, "file": "rank_00000.safetensors"}],
        },
    },
    "config": {"model": {"width": 2}},
    "data_fingerprint": "abc",
    "versions": {"torch": "2"},
    "revision": "f00",
    "origin": None,
}


def write(folder: Path, **over: Any) -> Path:
    """A complete checkpoint in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in TREE["files"].items():
        (folder / name).write_bytes(b"x" * file["bytes"])
    (folder / NAME).write_text(seal({**TREE, **over}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run") / "one")


def test_a_complete_checkpoint_reads_back(tmp_path: Path) -> None:
    got = Manifest.read(write(tmp_path / "c"))
    assert (got.folder, got.step, got.optimizer_steps) == (tmp_path / "c", 120, 118)
    assert (got.tensor_parallel, got.data_fingerprint) == (2, "abc")
    assert got.shapes == {"embedding.weight": (6, 2), "norm.weight": (2,)}
    assert got.pieces["embedding.weight"][1] == Piece(1, 0, 6, "rank_00001.safetensors")
    assert got.config == {"model": {"width": 2}}
    assert Piece(1, 30, 6, "f").key("exp_avg", "a.b") == "exp_avg/a.b/1/30"
    assert Manifest.read(write(tmp_path / "d", data_fingerprint=None)).data_fingerprint is None


@pytest.mark.parametrize("damage", ["grown", "shrunk", "gone", "empty", "folder"])
@pytest.mark.parametrize("name", TREE["files"])
def test_a_file_of_another_size_is_found(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path / "c") / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"grown": data + b"x", "shrunk": data[:-1], "empty": b""}[damage])
    with pytest.raises(BrokenCheckpoint, match=re.escape(name)) as caught:
        Manifest.read(tmp_path / "c")
    if damage in ("grown", "shrunk"):
        assert f"{len(data) + (1 if damage == 'grown' else -1)} bytes, the manifest says {len(data)}" in str(
            caught.value
        )


@pytest.mark.parametrize(
    "over", [{"format": "DeepSpeed"}, {"version": VERSION + 1}, {"version": None}, {"format": 3}]
)
def test_another_format_or_version_is_refused(tmp_path: Path, over: dict[str, Any]) -> None:
    with pytest.raises(BrokenCheckpoint, match=f"this reads '{FORMAT}' {VERSION}"):
        Manifest.read(write(tmp_path / "c", **over))


@pytest.mark.parametrize("key", TREE)
def test_every_key_is_needed(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path / "c")
    (folder / NAME).write_text(
        seal({name: value for name, value in TREE.items() if name != key}), encoding="utf-8"
    )
    with pytest.raises(BrokenCheckpoint, match=key):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "3", '"x"', "{" * 9999, '{"a":' * 9999, "\x00" * 40, "\ufeff{}", "9" * 5000],
)
def test_what_is_no_manifest_is_broken(one: Path, text: str) -> None:
    broken(one, text.encode())


def broken(folder: Path, data: bytes) -> None:
    before = (folder / NAME).read_bytes()
    try:
        (folder / NAME).write_bytes(data)
        with pytest.raises(BrokenCheckpoint, match=re.escape(str(folder))):
            Manifest.read(folder)
    finally:
        (folder / NAME).write_bytes(before)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_torn_manifest_is_broken(one: Path, data: st.DataObject) -> None:
    whole = (one / NAME).read_bytes()
    broken(one, whole[: data.draw(st.integers(0, len(whole) - 1))])


# "inf" and "nan" are numbers to Python's JSON reader, as is 1e999
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([float("inf"), "\0", "..", -1])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in [(*path, key), *nodes(value, (*path, key))]]


PLACES = nodes(TREE)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), VALUES, st.booleans()), min_size=1, max_size=3))
def test_a_changed_manifest_reads_or_is_broken(
    one: Path, changes: list[tuple[tuple[Any, ...], Any, bool]]
) -> None:
    tree = json.loads(json.dumps(TREE))
    for place, value, drop in changes:
        node = tree
        with contextlib.suppress(LookupError, TypeError):  # an earlier change took the place away
            for key in place[:-1]:
                node = node[key]
            if drop:
                del node[place[-1]]
            else:
                node[place[-1]] = value
    (one / NAME).write_text(seal(tree), encoding="utf-8")
    try:
        got = Manifest.read(one)
        assert isinstance(got.step, int)
        assert all(isinstance(size, int) for shape in got.shapes.values() for size in shape)
    except BrokenCheckpoint:
        pass
    finally:
        write(one)


def _loaded(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_flipped_bytes_read_or_are_broken(one: Path, data: st.DataObject) -> None:
    whole = bytearray(seal(TREE).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (one / NAME).write_bytes(bytes(whole))
    try:
        if json.loads(seal(TREE)) == _loaded(one / NAME):  # between tokens, or a byte flipped twice
            Manifest.read(one)
        else:
            with pytest.raises(BrokenCheckpoint):
                Manifest.read(one)
    finally:
        write(one)


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("key", ["step", "optimizer_steps", "tensor_parallel"])
def test_numbers_that_are_none_are_broken(tmp_path: Path, key: str, number: float) -> None:
    folder = write(tmp_path / "c", **{key: number})
    if number == 1e300:
        Manifest.read(folder)  # a whole number after all
        return
    with pytest.raises(BrokenCheckpoint):
        Manifest.read(folder)


def test_missing_tensors_are_told_one_sentence_each(one: Path) -> None:
    manifest = Manifest.read(one)
    assert list(missing_tensors(manifest, dict(manifest.shapes))) == []
    assert list(missing_tensors(manifest, {"norm.weight": (2,)})) == [], "more in the checkpoint is fine"
    wanted = {"norm.weight": (3,), "embedding.weight": (2, 6), "norm.bias": (2,)}
    assert list(missing_tensors(manifest, wanted)) == [
        "norm.weight is [2] there, [3] here",
        "embedding.weight is [6, 2] there, [2, 6] here",
        "norm.bias is not in it",
    ]
