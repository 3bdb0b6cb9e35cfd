"""Read what others pickled, and run nothing of it.

A pickle names callables and says what to call them with. Here each name stands for one of three things: what
torch's own ``weights_only`` unpickler rebuilds tensors of, an inert :class:`StandIn` that keeps what it is
called with, or, for every other name, a refusal. No foreign module is imported. Stand-ins are classes made
anew for each file, so that nothing a file does to them outlives it.

:func:`load` reads torch.save's zip files, tensors mapped into memory; :func:`load_part` reads one that lies
inside another file; :func:`unpickle` reads a bare pickle that holds no tensors. All raise ConfigError naming
the file, and where it is a name, the name.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sffn_dist.conversion import downloads
from sffn_dist.spec.config import ConfigError

# Data that frameworks keep beside tensors: configs, arguments, enums, random states. As stand-ins all of them
# are inert, whatever they do at home; the list says what is expected to be met, and anything else is a reason
# to distrust the file.
INERT = re.compile(
    r"""
    omegaconf\.[\w.]+ | deepspeed\.[\w.]+ | megatron\.[\w.]+
    | argparse\.Namespace | types\.SimpleNamespace | typing\.Any |
        builtins\.(dict|list|tuple|str|int|float|bool|bytes|type)
    | collections\.(OrderedDict|defaultdict) | (_io|io)\.BytesIO |
        pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path
    | datetime\.(datetime|date|timedelta|timezone) | signal\.Signals
    | numpy\.(ndarray|dtype|dtypes\.\w+) | numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)
    | numpy\.(_core|core)\.numeric\._frombuffer
    | torch\.(Size|device|dtype|(bfloat|float|complex|u?int|q?u?int)\w*|bool|half|double|long|short) |
        torch\.serialization\._get_layout
    | torch\.distributed\.checkpoint\.[\w.]+
    """,
    re.VERBOSE,
)
# What pickle.dump of data writes. Left out: the extension registry, persistent ids, calls by module and name,
# out-of-band buffers, and sizes given ahead of bytes that need not be there
OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE
        NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES
        BINBYTES
    BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT
        DICT
    SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
    """.split()  # noqa: SIM905
)


class StandIn:
    """An object of somebody else's class: what it was made with, in ``args``, and what it was then filled
    with, in ``state``.
    """

    __slots__ = ("args", "state")
    name = ""  # of the class, dotted

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> StandIn:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


def named(value: object) -> str:
    """The dotted name of the class that ``value`` is a stand-in of, or itself stands in for; "" of
    anything else.
    """
    if isinstance(value, StandIn):
        return type(value).name
    return value.name if isinstance(value, type) and issubclass(value, StandIn) else ""


def stand_in(name: str) -> type[StandIn]:
    """A class of its own for one name in one file."""
    return type("StandInOf", (StandIn,), {"__slots__": (), "name": name})


def attributes(value: object) -> dict[str, Any]:
    """What a stand-in's instance dictionary was to be; a plain dictionary as it is; {} of anything else."""
    state = value.state if isinstance(value, StandIn) else value
    if isinstance(state, tuple) and len(state) == 2:  # (dictionary, slots)
        state = (
            {**(state[0] or {}), **(state[1] or {})}
            if all(isinstance(part, dict | None) for part in state)
            else {}
        )
    return (
        {key: item for key, item in dict.items(state) if isinstance(key, str)}
        if isinstance(state, dict)
        else {}
    )


def _mapping(*_: Any) -> dict[Any, Any]:
    """In place of collections.defaultdict: items are set on it, which torch allows on true dictionaries
    alone.
    """
    return OrderedDict()


def _refuse(path: Path, names: Iterable[str]) -> None:
    if problems := [
        f"{path}: names {name}, which a file of weights has no use for; nothing of it was run"
        for name in sorted(names)
    ]:
        raise ConfigError(problems)


# ----------------------------------------------------------------------------------------- torch.save's files


def load(path: Path) -> Any:
    """What torch.save wrote to a file; tensors stay on disk until they are read."""
    downloads.check(path)
    try:
        with path.open("rb") as file:
            names = _globals(path, file)
        return _load(names, str(path), mmap=True)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file can make the reader stumble anywhere
        raise _unreadable(path, error) from None


def load_part(path: Path, start: int, length: int) -> Any:
    """What torch.save wrote to bytes ``start`` .. ``start + length`` of a file; tensors are read at once."""
    downloads.check(path)
    try:
        with io.BufferedReader(_Window(path, start, length)) as file:
            names = _globals(path, file)
            file.seek(0)
            return _load(names, file, mmap=False)
    except ConfigError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ConfigError:
    text = " ".join(str(error).split())[:200]
    if isinstance(error, OSError) and not isinstance(error, zipfile.BadZipFile):
        return ConfigError([f"{path}: cannot be read: {text}"])
    return ConfigError(
        [
            f"{path}: not a file that torch.save (1.6 or newer) wrote, or damaged: "
            f"{type(error).__name__}: {text}"
        ]
    )


def _globals(path: Path, file: BinaryIO) -> list[str]:
    """Names in the file that need a stand-in; raises ConfigError for one that is given none."""
    # torch.save stores; deflated entries could hold any amount, and cannot be mapped
    with zipfile.ZipFile(file) as archive:
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in archive.infolist()
        ):
            raise ConfigError([f"{path}: has compressed entries, which torch.save does not write"])
    file.seek(0)
    with _allowed():
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    _refuse(path, (name for name in names if not INERT.fullmatch(name)))
    return names


def _load(names: Iterable[str], source: str | BinaryIO, *, mmap: bool) -> Any:
    # a pair's name is all that torch looks at: these stand for the names while this file is read, and import
    # nothing
    pairs = [(_mapping if name == "collections.defaultdict" else stand_in(name), name) for name in names]
    with _allowed(*pairs), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


@contextlib.contextmanager
def _allowed(*pairs: tuple[Callable[..., Any], str]) -> Iterator[None]:
    """Nothing but torch's own and ``pairs``: libraries (megatron-core is one) add classes of theirs to
    torch's list, for all readers.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(list(pairs))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


class _Window(io.RawIOBase):
    """Bytes ``start`` ..

    ``start + length`` of a file, as a file; raises OSError if they reach past its end.
    """

    def __init__(self, path: Path, start: int, length: int):
        self._file, self._start, self._length, self._at = path.open("rb", buffering=0), start, length, 0
        if start < 0 or length < 0 or start + length > path.stat().st_size:
            self._file.close()
            raise OSError(f"bytes {start} to {start + length} are not all there")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        got = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)]) or 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


# ----------------------------------------------------------------------------------------------- bare pickles


class _Unpickler(pickle.Unpickler):
    """Knows stand-ins alone: not one object of this process can be reached by it."""

    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data))
        self._path, self._made = path, dict[str, type[StandIn]]()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if not INERT.fullmatch(full):
            _refuse(self._path, [full])
        return self._made.setdefault(full, stand_in(full))


def unpickle(path: Path) -> Any:
    """What pickle.dump wrote to a file, every object of a class a stand-in."""
    downloads.check(path)
    try:
        data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in OPCODES:
                raise ConfigError(
                    [f"{path}: has the pickle instruction {opcode.name}, which data needs none of"]
                )
            # the memo would grow to it
            if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise ValueError(f"memo place {argument}")
        return _Unpickler(path, data).load()
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    except Exception as error:
        raise ConfigError([f"{path}: not a pickle, or damaged: {type(error).__name__}: {error}"]) from None


# ---------------------------------------------------------------------------------------------------- tensors


def shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of a tensor that can be read as numbers.

    None of anything else: packed, sparse, without data, no tensor at all.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return None
    return tuple(value.shape) if value.dtype.is_floating_point and not value.is_quantized else None


def full_precision(value: Tensor) -> Tensor:
    """A copy in fp32, contiguous, of a tensor that :func:`shape_of` gives a shape."""
    return value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
