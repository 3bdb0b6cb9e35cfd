"""Pickles that would run something, and what every reader must do about them."""

from __future__ import annotations

import functools
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sffn_dist.config import ConfigError


class Calls:
    """An object whose pickle says to call something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class CallingDict(dict[str, str]):
    """A dictionary of that kind."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (self["command"],)


def harm(marker: Path) -> dict[str, Any]:
    """Objects that write ``marker`` when they are unpickled."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "check_call": Calls(subprocess.check_call, ["touch", str(marker)]),
        "open": Calls(open, str(marker), "w"),
        "nested": {"a": [OrderedDict(b=(1, {"c": Calls(os.system, command)}))]},
        "dict subclass": CallingDict(command=command),
        "pickle in a pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, command))),
    }


def parts_of_harm(folder: Path) -> dict[str, Any]:
    """Calls that do no harm by themselves, but are no business of a file of weights."""
    return {
        "partial": Calls(functools.partial, os.system, f"touch {folder / 'executed'}"),
        "getattr": Calls(getattr, "x", "upper"),
        "import": Calls(__import__, "this"),
        "torch.load": Calls(torch.load, str(folder / "no_such_file")),
        "torch.hub": Calls(torch.hub.set_dir, str(folder)),
        "Path": Calls(Path.touch, folder / "executed"),
    }


def _all(folder: Path) -> dict[str, Any]:
    return {**harm(folder / "executed"), **parts_of_harm(folder)}


@pytest.fixture(params=sorted(_all(Path())))
def payload(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An object that must not be unpickled."""
    return _all(tmp_path)[request.param]


@pytest.fixture(params=sorted(harm(Path())))
def harmful(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An object that writes tmp_path/executed when it is."""
    return harm(tmp_path / "executed")[request.param]


@pytest.fixture
def repickled() -> Callable[[Path, Callable[[bytes], bytes]], bytes]:
    """A torch file's bytes with its pickle changed and the archive around it intact, so that the change is met by the unpickler."""

    def change(path: Path, how: Callable[[bytes], bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
            for entry in source.infolist():
                data = source.read(entry)
                target.writestr(entry.filename, how(data) if entry.filename.endswith("data.pkl") else data)
        return buffer.getvalue()

    return change


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[Callable[[], Any]], str]:
    """See that a reader raises ConfigError and that nothing was executed; gives the message."""

    def check(read: Callable[[], Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            read()
        assert not (tmp_path / "executed").exists(), "the pickle was executed"
        return str(caught.value)

    return check
