"""Megatron's ``torch_dist`` format (torch.distributed.checkpoint).

    iter_0000100/.metadata        a pickle: of each tensor the full size and its chunks; of each chunk the
                                  file, offset and length
                 __0_0.distcp     chunks, each as torch.save writes a tensor
                 common.pt        torch.save of what is no sharded tensor: args, iteration, ...

A layer's tensors lie under a key of their own, or all layers' as one tensor with a leading axis
(decoder.layers.mlp.linear_fc2.weight). Chunks are read without torch.distributed.checkpoint, whose planner
unpickles what the metadata calls bytes, whatever it holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffn_dist.conversion import pickles
from sffn_dist.conversion.megatron_tensor import (
    BESIDE,
    MegatronCheckpoint,
    MegatronTensor,
    beside,
    iteration_of,
)
from sffn_dist.spec.config import ConfigError

STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
WRAPPERS = ("", "model.", "module.", "model.module.")
METADATA = "torch.distributed.checkpoint.metadata."


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor, and where in the folder it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def torch_dist(folder: Path) -> MegatronCheckpoint:
    """The checkpoint in an iteration's folder; raises ConfigError if its metadata is not of this format."""
    common: Any = pickles.load(folder / "common.pt") if (folder / "common.pt").is_file() else {}
    common = common if isinstance(common, dict) else {}
    try:
        tensors = _parse(pickles.unpickle(folder / ".metadata"))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            [f"{folder / '.metadata'}: not what torch.distributed.checkpoint writes: {error}"]
        ) from None
    wrapper = next((start for start in WRAPPERS if f"{start}embedding.word_embeddings.weight" in tensors), "")
    entries: dict[str, MegatronTensor] = {}
    for key, (shape, chunks) in tensors.items():
        if BESIDE.fullmatch(key):
            continue
        name = key.removeprefix(wrapper)
        stacked = STACKED.fullmatch(name)
        if not stacked:
            entries[name] = MegatronTensor(
                shape, partial(_box, folder, key, (0,) * len(shape), shape, chunks)
            )
            continue
        for layer in range(min(shape[0] if shape else 0, 10_000)):
            at, box = (layer, *(0,) * (len(shape) - 1)), (1, *shape[1:])
            entries[f"decoder.layers.{layer}.{stacked[1]}"] = MegatronTensor(
                shape[1:], partial(_box, folder, key, at, box, chunks, layer=True)
            )
    arguments = pickles.attributes(common.get("args"))
    return MegatronCheckpoint(folder, entries, arguments, iteration_of(common), beside(tensors))


def _parse(metadata: object) -> dict[str, tuple[tuple[int, ...], list[_Chunk]]]:
    """Key -> (full shape, chunks), of tensors.

    Raises KeyError, TypeError or ValueError for what is no such metadata.
    """
    if pickles.named(metadata) != f"{METADATA}Metadata":
        raise ValueError(f"holds {pickles.named(metadata) or type(metadata).__name__}")
    tree = pickles.attributes(metadata)
    places: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for index, info in dict.items(tree["storage_data"]):
        index_fields = pickles.attributes(index)
        if index_fields.get("offset") is not None:
            places[index_fields["fqn"], _size(index_fields["offset"])] = pickles.attributes(info)
    tensors = {}
    for key, value in dict.items(tree["state_dict_metadata"]):
        if pickles.named(value) != f"{METADATA}TensorStorageMetadata":
            continue  # bytes, of no use here
        tensor_metadata = pickles.attributes(value)
        boxes = [pickles.attributes(chunk) for chunk in list(tensor_metadata["chunks"])]
        chunks = [
            _chunk(places[key, _size(box["offsets"])], _size(box["offsets"]), _size(box["sizes"]))
            for box in boxes
        ]
        shape = _size(tensor_metadata["size"])
        if any(len(chunk.sizes) != len(shape) for chunk in chunks):
            raise ValueError(f"chunks of {key} that are none")
        tensors[str(key)] = shape, chunks
    return tensors


def _size(value: object) -> tuple[int, ...]:
    """A pickled torch.Size."""
    items = (
        value.args[0]
        if isinstance(value, pickles.StandIn) and pickles.named(value) == "torch.Size" and value.args
        else value
    )
    if not isinstance(items, tuple | list) or not all(
        isinstance(size, int) and 0 <= size < 2**53 for size in items
    ):
        raise ValueError("a size that is none")
    return tuple(items)


def _chunk(info: Mapping[str, Any], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> _Chunk:
    if info.get("transform_descriptors"):
        raise ValueError(f"chunks stored by {info['transform_descriptors']}")
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.distcp", file) or len(offsets) != len(sizes):
        raise ValueError(f"a chunk in {file!r}")
    return _Chunk(offsets, sizes, file, *_size((start, length)))


def _box(
    folder: Path,
    key: str,
    at: tuple[int, ...],
    box: tuple[int, ...],
    chunks: list[_Chunk],
    layer: bool = False,
) -> Tensor:
    """Elements ``at`` ..

    ``at + box`` of a tensor, chunk by chunk; raises ConfigError if chunks are missing or not what they should
    be.
    """
    parts = []
    for chunk in chunks:
        low = [max(a, o) for a, o in zip(at, chunk.offsets, strict=True)]
        high = [min(a + b, o + s) for a, b, o, s in zip(at, box, chunk.offsets, chunk.sizes, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            parts.append((chunk, low, [b - a for a, b in zip(low, high, strict=True)]))
    covered = sum(math.prod(lengths) for _, _, lengths in parts)
    long_enough = all(
        math.prod(chunk.sizes) <= chunk.length for chunk, _, _ in parts
    )  # a byte an element at least, or the file is wrong
    if covered != math.prod(box) or not long_enough:
        raise ConfigError(
            [f"{folder}: has {covered} of {math.prod(box)} elements of {key}, or chunks too short"]
        )
    full = torch.zeros(box)
    for chunk, low, lengths in parts:
        stored = pickles.load_part(folder / chunk.file, chunk.start, chunk.length)
        if pickles.shape_of(stored) != chunk.sizes:
            raise ConfigError(
                [f"{folder / chunk.file}: holds no tensor of shape {list(chunk.sizes)} for {key}"]
            )
        target = tuple(slice(a - b, a - b + n) for a, b, n in zip(low, at, lengths, strict=True))
        source = tuple(slice(a - o, a - o + n) for a, o, n in zip(low, chunk.offsets, lengths, strict=True))
        full[target] = stored.detach()[source]
    return full[0] if layer else full
