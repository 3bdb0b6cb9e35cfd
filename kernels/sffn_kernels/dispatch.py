"""Which implementation of an operation runs: plain torch (cuBLAS on CUDA devices), or a Triton kernel with
one of its tilings.

The setting (:func:`use`) is ``torch``, ``triton``, or ``auto``: whichever was measured to be fastest for the
operation, dtype, sizes and device, and plain torch where the times do not tell them apart (``choices``). What
was measured is kept in tables, a JSON file a device: those in ``tables/``, if any, come with the package; for
what no table says, all candidates are timed once, on the tensors at hand (``timing``), and the result is
cached in ``$XDG_CACHE_HOME/sffn_dist/kernels`` (``~/.cache/...``).

On CPUs ``auto`` is plain torch. Ranks that compute the same thing must do so with the same kernel, or
replicas drift apart: times are passed through :func:`agree_by` before they decide, and tables are shared by
:func:`shared_table`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from sffn_kernels import choices, timing
from sffn_kernels.choices import KernelChoice

Setting = Literal["auto", "torch", "triton"]
T = TypeVar("T")
Ways = dict[str, Callable[[], T]]

# Compute capability from which Triton's bf16 products run on tensor cores.
LEAST_CAPABILITY = (8, 0)
_log = logging.getLogger(__name__)


class _DispatchState:
    setting: Setting = "auto"
    table: dict[str, KernelChoice] | None = None
    # row -> the best without torch, under the setting triton; of this process alone
    among_kernels: dict[str, KernelChoice] = {}
    folder: Path | None = None  # where the table is written; None: the cache
    writes: bool = True
    agree: Callable[[list[float]], list[float]] | None = None
    meet: Callable[[], None] = staticmethod(lambda: None)
    measures: bool = True
    clock: Callable[[torch.device], timing.Clock] = timing.CudaClock
    pace = timing.Pace()


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


@contextmanager
def unmeasured() -> Iterator[None]:
    """Within the block nothing is timed, and no table asked: ``auto`` is plain torch, ``triton`` the first
    tiling of each operation. For what is computed a few times, in sizes that nothing else has.
    """
    before, _DispatchState.measures = _DispatchState.measures, False
    try:
        yield
    finally:
        _DispatchState.measures = before


def prefers_kernels() -> bool:
    """Whether kernels run without being the faster ones: under the setting ``triton``."""
    return _DispatchState.setting == "triton"


def agree_by(
    combine: Callable[[list[float]], list[float]] | None,
    *,
    meet: Callable[[], None] = lambda: None,
    writes: bool = True,
) -> None:
    """How ranks make one list of times of their several ones, in place of each believing its own.

    ``meet``: waits for the other ranks, so that all time at once. ``writes``: this one keeps the table.

    None: there is one rank. Where there are several all the same, nothing is measured: they would come to
    different choices.
    """
    _DispatchState.agree, _DispatchState.writes = None if combine is None else staticmethod(combine), writes
    _DispatchState.meet = staticmethod(meet)


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
        if setting == "triton" or name == "torch" or not timing.too_large(error):
            raise
        # the table is another Triton's, whose kernels were smaller
        _table(like.device)[row] = KernelChoice("torch", "torch")
        return plain()


def key(op: str, dtype: torch.dtype, sizes: Sequence[int]) -> str:
    """A row's name in a table.

    Tokens count by the power of two that holds them: the choice changes slowly with them.
    """
    tokens = 1 << max(0, sizes[0] - 1).bit_length()
    return " ".join([op, str(dtype).removeprefix("torch."), "x".join(map(str, (tokens, *sizes[1:])))])


def _chosen(row: str, device: torch.device, ways: Ways[T]) -> str:
    if not _DispatchState.measures:
        return next(iter(ways))
    auto = _DispatchState.setting == "auto"
    table = _table(device) if auto else _DispatchState.among_kernels
    if row in table and table[row].way in ways:
        return table[row].way
    if (
        device.type != "cuda"
        or torch.cuda.is_current_stream_capturing()
        or (_DispatchState.agree is None and not _alone())
    ):
        return next(iter(ways))
    with torch.cuda.device(device):
        table[row] = _measured(row, ways, _DispatchState.clock(device))
    if auto and _DispatchState.writes:
        choices.write(device, table, _DispatchState.folder)
    return table[row].way


def _measured(row: str, ways: Ways[T], clock: timing.Clock) -> KernelChoice:
    """The choice from the times of all ranks, alike on all of them."""
    pace, started, kernels = _DispatchState.pace, time.monotonic(), len(ways) - ("torch" in ways)
    beside = " and plain torch" if "torch" in ways else ""
    _log.info("kernels: %s: timing %d Triton kernels%s, %s", row, kernels, beside, pace.expected(kernels))
    times = timing.measure(ways, clock, _DispatchState.meet)
    if _DispatchState.agree is not None:  # a turn's time is that of all ranks
        flat = iter(_DispatchState.agree([value for values in times.values() for value in values]))
        times = {name: [next(flat) for _ in values] for name, values in times.items()}
    choice = choices.choose(times)
    pace.timed(kernels, started)
    _log.info("kernels: %s: %s", row, choice)
    return choice


# ----------------------------------------------------------------------------------------------------- tables


def _table(device: torch.device) -> dict[str, KernelChoice]:
    if _DispatchState.table is None:
        _DispatchState.table = choices.known(device)
    return _DispatchState.table


def shared_table(
    device: torch.device, share: Callable[[dict[str, KernelChoice]], dict[str, KernelChoice]]
) -> None:
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
