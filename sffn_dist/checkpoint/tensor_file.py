"""Write a safetensors file tensor by tensor, hashing on the way: what is in memory at once is one tensor, not
the file.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length n, n bytes of JSON
header, then the tensors' bytes one after another. The header comes first, so names, types and shapes must be
known before the first tensor is. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sffn_dist.atomic_io import sync

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHUNK = 1 << 24  # bytes hashed and written at a time


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes before the first tensor, padded to a multiple of 8."""
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, entry in entries.items():
        tree[key] = {
            "dtype": TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.bytes],
        }
        end += entry.bytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """A safetensors file being written.

    A context manager, which on an exception closes the file as it is and leaves it incomplete.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str] | None = None
    ):
        self.path, self._left = path, dict(entries)
        self._hash, self._file = hashlib.sha256(), path.open("wb")
        self.bytes = 0
        self._write(memoryview(header(entries, metadata or {})))

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a tensor; they must come in the order of the entries.

        Raises ValueError if it is not what the header states.
        """
        expected, entry = next(iter(self._left.items()), (None, None))
        if (
            key != expected
            or entry is None
            or (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape)
        ):
            raise ValueError(
                f"{self.path}: {key} {tensor.dtype} {tuple(tensor.shape)} where {expected} {entry} is due"
            )
        del self._left[key]
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        if flat.numel():
            self._write(flat.view(torch.uint8).numpy().data)

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self._hash.update(chunk)
            self._file.write(chunk)
        self.bytes += len(data)

    def close(self) -> tuple[int, str]:
        """Bring the file to disk; returns (bytes, sha256). Raises ValueError if tensors are missing."""
        if self._left:
            raise ValueError(f"{self.path}: {next(iter(self._left))} was not written")
        self._file.close()
        sync(self.path)
        return self.bytes, self._hash.hexdigest()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
