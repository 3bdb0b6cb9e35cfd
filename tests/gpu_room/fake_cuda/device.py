"""A CUDA device that torch believes in and that computes nothing: for FakeTensorMode with ``cuda`` tensors.

The C++ half (guard.cpp) is compiled here and must be loaded before torch is imported; the Python half answers
``torch.cuda``. Only a process of its own may do either.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The C++ compiler of this machine, if it has one."""
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def compile_guard(folder: Path) -> Path:
    """guard.cpp as a library below ``folder``; torch is not imported.

    Raises RuntimeError with what the compiler said.
    """
    library, headers = folder / "guard.so", _torch() / "include"
    command = [str(compiler()), "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{headers}", str(SOURCE)]
    command += ["-o", str(library), f"-L{_torch() / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return library


def load_guard(library: Path) -> None:
    """Register the guard and the hooks with torch's libraries, which ask for hooks when torch is imported."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


class Stream:
    """A stream; ``synchronize`` is counted."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = None, 0

    def synchronize(self) -> None:
        _synchronize("stream")

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """An event; ``synchronize`` is counted."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _synchronize("event")

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class Properties:
    """Of an H100."""

    name, major, minor, total_memory, multi_processor_count = "fake", 9, 0, 80 * 2**30, 132


_listeners: list[Callable[[str], None]] = []


def _synchronize(kind: str) -> None:
    for listener in _listeners:
        listener(kind)


def on_synchronize(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with "device", "stream" or "event" whenever the host waits for one."""
    _listeners.append(listener)


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _set_device(device: Any) -> None:
    """As a driver that shows this process one device."""
    import torch

    if device if isinstance(device, int) else torch.device(device).index:
        raise RuntimeError(f"CUDA error: invalid device ordinal: {device}")


def pretend() -> None:
    """Answer ``torch.cuda`` for the rest of this process, and replace what only a device can do."""
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch.nn import functional

    stream, cuda = Stream(), torch.cuda
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _set_device,
        "get_device_properties": lambda *_: Properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "fake",
        "is_bf16_supported": lambda *_: True,
        "Stream": Stream,
        "Event": Event,
        "stream": _nothing,
        "device": _nothing,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "synchronize": lambda *_: _synchronize("device"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (70 * 2**30, 80 * 2**30),
        "memory_stats": lambda *_: {},
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
    }
    for kind in ("allocated", "reserved", "cached"):
        answers |= {f"memory_{kind}": lambda *_: 0, f"max_memory_{kind}": lambda *_: 0}
        answers[f"reset_max_memory_{kind}"] = lambda *_: None
    answers["reset_peak_memory_stats"] = lambda *_: None
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_: None)
    cuda.nccl.version = lambda: (2, 27, 0)
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign,assignment]
    # parameters are made in bf16 on the device, and fake ones cannot be exchanged for others
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    CudaRNGStatesTracker.fork = _nothing
    functional.scaled_dot_product_attention = _flash_attention


def _pin(x: Any, *_: Any) -> Any:
    x.pretended_pinned = True
    return x


def _flash_attention(query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
    """Torch chooses among its attentions by what the device can do: here flash, as on CUDA in bf16."""
    import torch

    out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, options["is_causal"], scale=options["scale"]
    )
    return out
