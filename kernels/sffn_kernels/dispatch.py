"""Which implementation of an operation runs: plain torch (cuBLAS on CUDA devices), or a Triton kernel with
one of its tilings.

The setting (:func:`use`) is ``torch``, ``triton``, or ``auto``: whichever was measured to be fastest for the
operation, dtype, sizes and device. What was measured is kept in tables, a JSON file a device: those in
``tables/``, if any, come with the package; for what no table says, all candidates are timed once, on the
tensors at hand, and the result is cached in ``$XDG_CACHE_HOME/sffn_dist/kernels`` (``~/.cache/...``).

On CPUs ``auto`` is plain torch. Ranks that compute the same thing must do so with the same kernel, or
replicas drift apart: times are passed through :func:`agree_by` before they decide, and tables are shared by
:func:`shared_table`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

Setting = Literal["auto", "torch", "triton"]
T = TypeVar("T")
Ways = dict[str, Callable[[], T]]

# Compute capability from which Triton's bf16 products run on tensor cores.
LEAST_CAPABILITY = (8, 0)
TABLES = Path(__file__).with_name("tables")
_REPEATS, _WARMUP = 7, 2
_AHEAD = 500_000  # cycles, some 0.3 ms


class _DispatchState:
    setting: Setting = "auto"
    table: dict[str, str] | None = None
    among_kernels: dict[
        str, str
    ] = {}  # row -> the best without torch, under the setting triton; of this process alone
    folder: Path | None = None  # where the table is written; None: the cache
    writes: bool = True
    agree: Callable[[list[float]], list[float]] | None = None


def use(setting: str) -> None:
    """Choose for the whole process.

    Raises ValueError for a name that is none, RuntimeError if Triton is asked for and cannot run.
    """
    if setting not in get_args(Setting):
        raise ValueError(f"kernels = {setting!r}: must be one of {', '.join(get_args(Setting))}")
    reason = (
        unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if setting == "triton"
        else None
    )
    if reason:
        raise RuntimeError(f"kernels = 'triton': {reason}")
    _DispatchState.setting = cast(Setting, setting)


@contextmanager
def using(setting: str) -> Iterator[None]:
    """:func:`use` within a block."""
    before = _DispatchState.setting
    use(setting)
    try:
        yield
    finally:
        _DispatchState.setting = before


def agree_by(combine: Callable[[list[float]], list[float]] | None, *, writes: bool = True) -> None:
    """How ranks make one list of times of their several ones, in place of each believing its own.

    ``writes``: this one keeps the table.

    None: there is one rank. Where there are several all the same, nothing is measured: they would come to
    different choices.
    """
    _DispatchState.agree, _DispatchState.writes = None if combine is None else staticmethod(combine), writes


def _alone() -> bool:
    return not (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def interpreted() -> bool:
    """True if Triton's interpreter stands in for a device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return (
            f"Triton needs a CUDA device (or TRITON_INTERPRET=1, for tests), and this runs on {device.type}"
        )
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        return (
            f"needs compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}, and this device has "
            f"{found[0]}.{found[1]}"
        )
    return None


def run(
    op: str, sizes: Sequence[int], like: Tensor, plain: Callable[[], T], kernels: Callable[[], Ways[T]]
) -> T:
    """The result of ``plain`` or of one of ``kernels``, which all give the same.

    ``sizes`` starts with the number of tokens.

    ``kernels`` is called only where Triton can run; its ways are in order of preference, for when nothing can
    be measured: under CUDA graph capture, and in the interpreter.
    """
    setting = _DispatchState.setting
    on_host = like.device.type != "cuda"
    if (
        setting == "torch"
        or like.dtype == torch.float64
        or (on_host and (setting == "auto" or not interpreted()))
    ):
        return plain()  # what a run computes on the host beside its devices has no kernels
    reason = unavailable(like.device)
    if interpreted() and like.dtype == torch.bfloat16:
        reason = "Triton's interpreter multiplies bf16 wrongly; use float32 or float16"
    if reason:
        if setting == "triton":
            raise RuntimeError(f"kernels = 'triton': {reason}")
        return plain()
    ways = kernels()  # may be none: no kernel takes every size
    if setting == "auto" or not ways:
        ways = {"torch": plain, **ways}
    if len(ways) == 1 or 0 in sizes:
        return next(iter(ways.values()))()
    row = key(op, like.dtype, sizes)
    name = _chosen(row, like.device, ways)
    try:
        return ways[name]()
    except Exception as error:
        if setting == "triton" or name == "torch" or not _too_large(error):
            raise
        _table(like.device)[row] = "torch"  # the table is another Triton's, whose kernels were smaller
        return plain()


def key(op: str, dtype: torch.dtype, sizes: Sequence[int]) -> str:
    """A row's name in a table.

    Tokens count by the power of two that holds them: the choice changes slowly with them.
    """
    tokens = 1 << max(0, sizes[0] - 1).bit_length()
    return " ".join([op, str(dtype).removeprefix("torch."), "x".join(map(str, (tokens, *sizes[1:])))])


def _chosen(row: str, device: torch.device, ways: Ways[T]) -> str:
    auto = _DispatchState.setting == "auto"
    table = _table(device) if auto else _DispatchState.among_kernels
    best = table.get(row)
    if best in ways:
        return best
    if (
        device.type != "cuda"
        or torch.cuda.is_current_stream_capturing()
        or (_DispatchState.agree is None and not _alone())
    ):
        return next(iter(ways))
    with torch.cuda.device(device):
        times = [_time(name, way) for name, way in ways.items()]
    times = times if _DispatchState.agree is None else _DispatchState.agree(times)
    best = min(zip(times, ways, strict=True))[1]
    table[row] = best
    if auto and _DispatchState.writes:
        _write(device, table)
    return best


def _too_large(error: Exception) -> bool:
    """Triton's OutOfResources, whose place in its package changed between versions."""
    return "OutOfResources" in type(error).__name__


def _time(name: str, way: Callable[[], T]) -> float:
    """Median milliseconds on the current CUDA device.

    Infinite, with a warning, if the way does not run there.

    Whatever fails fails alike in every process only by luck, so no error is let out: other ranks wait for
    this one's times.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    try:
        for repeat in range(_WARMUP + _REPEATS):
            torch.cuda._sleep(
                _AHEAD
            )  # the host gets ahead meanwhile: what it takes to launch is not measured
            start.record()
            way()
            end.record()
            end.synchronize()
            if repeat >= _WARMUP:
                times.append(start.elapsed_time(end))
    except Exception as error:
        if name == "torch":
            raise  # nothing would be left
        if not _too_large(error):
            warnings.warn(
                f"{name}: does not run here, and is left out ({type(error).__name__}: {error})", stacklevel=2
            )
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return float("inf")
    return statistics.median(times)


# ----------------------------------------------------------------------------------------------------- tables


@cache
def _name(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


def cache_folder() -> Path:
    """Where what was measured on this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sffn_dist" / "kernels"


def triton_version() -> str | None:
    """Of the package that is installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def read_table(path: Path, triton: str | None = None) -> dict[str, str]:
    """Row -> way; none if it was measured with another ``triton``.

    A file that is no such table counts as empty, with a warning.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["rows"]
        if isinstance(rows, dict) and all(isinstance(text, str) for text in rows.values()):
            return rows if triton is None or content.get("triton") == triton else {}
        raise ValueError("rows: must be names by names")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: not a table of kernels, left aside ({error})", stacklevel=2)
        return {}


def _table(device: torch.device) -> dict[str, str]:
    if _DispatchState.table is None:
        file = f"{_name(device)}.json" if device.type == "cuda" else "none.json"
        measured = read_table(cache_folder() / file, triton_version())
        _DispatchState.table = {**read_table(TABLES / file), **measured}
    return _DispatchState.table


def shared_table(device: torch.device, share: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Let all ranks read one table: ``share`` gives each the one of the first."""
    _DispatchState.table = share(_table(device))


@contextmanager
def measuring_into(folder: Path | None) -> Iterator[None]:
    """Within the block measure every choice anew, and write what is found into the device's table in
    ``folder``; None: as ever.
    """
    before = _DispatchState.table, _DispatchState.folder
    if folder is not None:
        _DispatchState.table, _DispatchState.folder = {}, folder
    try:
        yield
    finally:
        _DispatchState.table, _DispatchState.folder = before


def _write(device: torch.device, table: dict[str, str]) -> None:
    """Replace the file in one step, its other rows kept.

    Where it cannot be written, the next process measures anew.
    """
    folder = _DispatchState.folder or cache_folder()
    path = folder / f"{_name(device)}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = {**read_table(path, triton_version()), **table}
        versions = {"torch": torch.__version__, "triton": triton_version()}
        content = {
            "device": torch.cuda.get_device_name(device),
            **versions,
            "rows": dict(sorted(rows.items())),
        }
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
        Path(file.name).replace(path)
    except OSError:
        return
