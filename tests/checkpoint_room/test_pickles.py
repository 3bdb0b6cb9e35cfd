"""Others' pickles: data comes through, nothing is run, and a damaged file is a ConfigError whatever is
wrong with it.
"""

from __future__ import annotations

import argparse
import datetime
import enum
import io
import pickle
import sys
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sffn_dist.conversion import pickles
from sffn_dist.spec.config import ConfigError

Refused = Callable[[Callable[[], Any]], str]
TENSORS = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def foreign() -> Iterator[types.ModuleType]:
    """A module that is there when the file is written and gone when it is read."""
    module = types.ModuleType("megatron.gone")

    class Kind(enum.Enum):
        ONE = 1

    class Node:
        pass

    for cls in (Kind, Node):
        cls.__module__, cls.__qualname__ = "megatron.gone", cls.__name__
        setattr(module, cls.__name__, cls)
    sys.modules["megatron.gone"] = module
    yield module
    sys.modules.pop("megatron.gone", None)


# ----------------------------------------------------------------------------------------------- what is read


def test_tensors_and_data_come_through(tmp_path: Path, foreign: types.ModuleType) -> None:
    node = foreign.Node()
    node.value = [1, {"a": None}]
    tree = {
        **TENSORS,
        "args": argparse.Namespace(hidden_size=8, dtype=torch.bfloat16, kind=foreign.Kind.ONE),
        "numpy": np.random.default_rng(1).random(3),
        "state": np.random.RandomState(1).get_state(),
        "time": datetime.timedelta(3),
        "node": node,
        "many": defaultdict(list, {1: [2]}),
        "path": Path("a/b"),
    }
    torch.save(tree, tmp_path / "f.pt")
    del sys.modules["megatron.gone"]
    got = pickles.load(tmp_path / "f.pt")
    assert all(torch.equal(got[name], tensor) for name, tensor in TENSORS.items())
    arguments = pickles.attributes(got["args"])
    assert (arguments["hidden_size"], arguments["dtype"]) == (8, torch.bfloat16)
    assert (pickles.named(arguments["kind"]), arguments["kind"].args) == ("megatron.gone.Kind", (1,))
    assert pickles.attributes(got["node"]) == {"value": [1, {"a": None}]}
    assert got["many"] == {1: [2]}
    assert isinstance(got["numpy"], pickles.StandIn)
    assert pickles.named(got["path"]).endswith("Path")
    assert "megatron.gone" not in sys.modules


def test_a_part_of_a_file_is_read_as_a_file_is(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    data = buffer.getvalue()
    (tmp_path / "f").write_bytes(b"x" * 77 + data + b"y" * 5)
    got = pickles.load_part(tmp_path / "f", 77, len(data))
    assert all(torch.equal(got[name], tensor) for name, tensor in TENSORS.items())
    for start, length in ((76, len(data)), (77, len(data) - 1), (77, len(data) + 6), (-1, 5), (0, 77)):
        with pytest.raises(ConfigError):
            pickles.load_part(tmp_path / "f", start, length)


def test_bare_pickles_are_stand_ins_throughout(tmp_path: Path, foreign: types.ModuleType) -> None:
    (tmp_path / "f").write_bytes(
        pickle.dumps({"size": torch.Size((2, 3)), "dtype": torch.float32, "kind": foreign.Kind.ONE})
    )
    got = pickles.unpickle(tmp_path / "f")
    assert (pickles.named(got["size"]), got["size"].args) == ("torch.Size", ((2, 3),))
    assert pickles.named(got["dtype"]) == "torch.float32"
    assert pickles.named(got["kind"]) == "megatron.gone.Kind"


def test_nothing_stays_of_a_file(tmp_path: Path) -> None:
    torch.save(argparse.Namespace(a=1), tmp_path / "f.pt")
    before = torch.serialization.get_safe_globals()
    kinds = [type(pickles.load(tmp_path / "f.pt")) for _ in range(2)]
    assert kinds[0] is not kinds[1], "what a file does to its classes must not outlive it"
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_what_others_allow_torch_is_not_allowed_here(tmp_path: Path, refused: Refused) -> None:
    torch.save({"n": argparse.Namespace(a=1)}, tmp_path / "f.pt")
    torch.save({"n": io.StringIO}, tmp_path / "g.pt")
    with torch.serialization.safe_globals([argparse.Namespace, io.StringIO]):
        assert isinstance(pickles.load(tmp_path / "f.pt")["n"], pickles.StandIn)
        refused(lambda: pickles.load(tmp_path / "g.pt"))
        assert set(torch.serialization.get_safe_globals()) >= {argparse.Namespace, io.StringIO}


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (torch.ones(2, 3), (2, 3)),
        (torch.nn.Parameter(torch.ones(2, dtype=torch.float16)), (2,)),
        (torch.ones(2, dtype=torch.int64), None),
        (torch.ones(2, dtype=torch.complex64), None),
        (torch.ones(2, device="meta"), None),
        (torch.ones(2, 2).to_sparse(), None),
        ([1.0], None),
        (None, None),
    ],
)
def test_shapes_are_of_numbers_alone(value: Any, shape: tuple[int, ...] | None) -> None:
    assert pickles.shape_of(value) == shape


def test_full_precision_is_a_copy() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        source = torch.arange(6.0, dtype=dtype).view(2, 3).t()
        got = pickles.full_precision(source)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert torch.equal(got, source.float())
        got.zero_()
        assert source.sum() == 15


# -------------------------------------------------------------------------------------------- what is refused


def test_the_harmful_ones_are(harmful: Any, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(harmful))
    assert (tmp_path / "executed").exists()


def test_torch_files_are_not_executed(payload: Any, tmp_path: Path, refused: Refused) -> None:
    torch.save({**TENSORS, "config": payload}, tmp_path / "f.pt")
    assert "names " in refused(lambda: pickles.load(tmp_path / "f.pt"))
    data = (tmp_path / "f.pt").read_bytes()
    assert str(tmp_path / "f.pt") in refused(lambda: pickles.load_part(tmp_path / "f.pt", 0, len(data)))


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickles_are_not_executed(payload: Any, protocol: int, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "f").write_bytes(pickle.dumps({"a": 1, "b": payload}, protocol=protocol))
    assert str(tmp_path / "f") in refused(lambda: pickles.unpickle(tmp_path / "f"))


def test_old_torch_files_are_not_executed(payload: Any, tmp_path: Path, refused: Refused) -> None:
    torch.save({**TENSORS, "config": payload}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    assert "torch.save" in refused(lambda: pickles.load(tmp_path / "f.pt"))


def test_the_refusal_names_the_file_and_the_name(tmp_path: Path, refused: Refused) -> None:
    for name in ("f.pt", "g.pt"):
        harmful = __import__("os").system if name == "f.pt" else eval
        torch.save({"a": harmful}, tmp_path / name)
        message = refused(lambda: pickles.load(tmp_path / name))  # noqa: B023
        assert f"{tmp_path / name}: names {'posix.system' if name == 'f.pt' else 'builtins.eval'}" in message
    (tmp_path / "h").write_bytes(pickle.dumps(eval))
    assert "names builtins.eval" in refused(lambda: pickles.unpickle(tmp_path / "h"))


RAW = {
    "persistent id": b"\x80\x04\x8c\x01aQ.",
    "extension": b"\x80\x04\x82\x01.",
    "inst": b"(cposix\nsystem\n(S'touch executed'\ni__main__\nx\n.",
    "obj": b"(cargparse\nNamespace\no.",
    "memo beyond all memory": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo in decimal": b"Np2147483647\n.",
    "bytearray of a terabyte": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "string of four gigabytes": b"\x80\x04X\xff\xff\xff\xffa.",
    "endless": b"\x80\x04N",
    "two objects, no end": b"\x80\x04NN",
    "a class filled": b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb.",
    "a number called": b"\x80\x02K\x01)R.",
    "a stand-in appended to": b"\x80\x02cargparse\nNamespace\n)\x81K\x01a.",
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_instructions_that_data_needs_none_of(name: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "f").write_bytes(RAW[name])
    refused(lambda: pickles.unpickle(tmp_path / "f"))
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as archive:
        for entry, data in (("f/data.pkl", RAW[name]), ("f/version", b"3\n"), ("f/byteorder", b"little")):
            archive.writestr(entry, data)
    if "memo" not in name:  # torch's memo is a dictionary
        refused(lambda: pickles.load(tmp_path / "f.pt"))


def test_a_file_cannot_plant_attributes(tmp_path: Path) -> None:
    """State stays in ``state``: no method of a stand-in, nor of its class, can be replaced by the file."""
    filled = argparse.Namespace()
    vars(filled).update({"args": (7,), "name": "torch.Tensor", "__class__": 1, "__setstate__": 2})
    torch.save(filled, tmp_path / "f.pt")
    got = pickles.load(tmp_path / "f.pt")
    assert (pickles.named(got), got.args) == ("argparse.Namespace", ())
    assert pickles.attributes(got)["args"] == (7,)


@pytest.mark.parametrize("what", ["missing", "empty", "text", "folder", "old", "compressed", "script"])
def test_what_torch_did_not_save(what: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "f.pt"
    if what == "folder":
        path.mkdir()
    elif what == "old":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    elif what == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif what == "compressed":
        torch.save(TENSORS, tmp_path / "g.pt")
        with (
            zipfile.ZipFile(tmp_path / "g.pt") as source,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for entry in source.infolist():
                target.writestr(entry.filename, source.read(entry))
    elif what != "missing":
        path.write_bytes({"empty": b"", "text": b"PK and more"}[what])
    assert str(path) in refused(lambda: pickles.load(path))
    if what != "old":  # those begin with a pickle, of a number
        refused(lambda: pickles.unpickle(path))


# ----------------------------------------------------------------------------------------------------- damage

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """A file cut short, or with some bytes changed."""
    if data.draw(st.booleans()):
        return whole[: data.draw(st.integers(0, len(whole) - 1))]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed)


@FUZZ
@given(data=st.data())
def test_damaged_torch_files_read_or_are_refused(tmp_path: Path, repickled: Any, data: st.DataObject) -> None:
    torch.save({"w": TENSORS["w"], "args": argparse.Namespace(a=[1, "b"])}, tmp_path / "f.pt")
    if data.draw(st.booleans()):
        (tmp_path / "g.pt").write_bytes(repickled(tmp_path / "f.pt", lambda whole: damaged(data, whole)))
    else:
        (tmp_path / "g.pt").write_bytes(damaged(data, (tmp_path / "f.pt").read_bytes()))
    try:
        got = pickles.load(tmp_path / "g.pt")
        pickles.load_part(tmp_path / "g.pt", 0, (tmp_path / "g.pt").stat().st_size)
    except ConfigError:
        return
    for value in got.values() if isinstance(got, dict) else [got]:
        if (shape := pickles.shape_of(value)) is not None and np.prod(shape) < 1000:
            pickles.full_precision(value)


@FUZZ
@given(data=st.data())
def test_damaged_pickles_read_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = pickle.dumps(
        {"a": torch.Size((2,)), "b": argparse.Namespace(c=[1.5, "x", (None, True)]), "d": {1: b"2"}}
    )
    (tmp_path / "g").write_bytes(damaged(data, whole))
    try:
        pickles.unpickle(tmp_path / "g")
    except ConfigError:
        return
