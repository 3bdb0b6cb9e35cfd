"""Write a checkpoint from full tensors, one at a time: for another layout, or from another format.

Any layout reads any checkpoint, so what a conversion chooses is locality: a tensor-parallel rank's parts lie
in ``data`` files of their own, what all ranks hold in the first one's. The ZeRO stage is no property of the
files. In memory at once: a full tensor and a rank's part of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffn_dist import strict_json
from sffn_dist.atomic_io import atomic_folder, hash_file, write_text
from sffn_dist.checkpoint.manifest import TOKENIZER, TOKENIZER_SETTINGS, File, Manifest, Piece
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.tensor_file import TensorEntry, TensorFile
from sffn_dist.checkpoint.versions import revision, versions
from sffn_dist.checkpoint.weights import Weights, finite
from sffn_dist.checkpoint.writer import check_room
from sffn_dist.parallel.split import shard
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import model_tensors
from sffn_dist.structured.cut import TensorSpec

START = "start.json"  # of an import: a config to start from
FullTensor = Callable[[str, str], Tensor]  # (name, kind) -> full fp32 tensor


def reshard(source: Manifest, target: Path, *, tensor: int, data: int = 1) -> Manifest:
    """The checkpoint as ``tensor`` x ``data`` ranks would have written it, bit for bit the same tensors.

    Raises ConfigError where the model does not fit ``tensor`` ranks, ``target`` exists, or the disk has no
    room; BrokenCheckpoint.
    """
    reader = Reader(source)
    tree = {**source.config, "parallel": {**source.config["parallel"], "tensor": tensor}}
    cut = dataclasses.replace(
        source, config=loading.from_tree(tree).model_dump(mode="json"), tensor_parallel=tensor
    )
    texts = {
        name: (source.folder / name).read_text(encoding="utf-8")
        for name in (TOKENIZER, *TOKENIZER_SETTINGS, START)
        if name in source.files
    }
    return write(cut, reader.full, target, data=data, texts=texts)


def write_weights(weights: Weights, target: Path) -> Manifest:
    """A checkpoint of a model from elsewhere, without moments: for ``init_from``, exports, inspection.

    Raises ConfigError where no run could have this config, or naming a tensor that holds NaN or inf; nothing
    is written then.
    """
    tree = start_config(weights, target)
    loading.from_tree({**tree, "train": {"steps": 1}})  # what a run that starts from it checks first
    texts = {START: strict_json.dumps(tree, indent=1) + "\n", **weights.tokenizer_texts()}

    def full(name: str, _: str) -> Tensor:
        return finite(weights.full(name), name, weights.origin)

    return write(header(weights, target), full, target, texts=texts)


def start_config(weights: Weights, target: Path) -> dict[str, Any]:
    """What a run's config must set to start from an imported checkpoint: its model and where it lies.

    ``train`` is the user's.
    """
    tree = weights.config.model_dump(mode="json", include={"model", "ffn"}, exclude_none=True)
    place = target.resolve()
    return {
        **tree,
        **({"guide": {"mode": "fixed_step"}} if weights.guide else {}),
        **({"data": {"tokenizer": str(place / TOKENIZER)}} if weights.tokenizer is not None else {}),
        "init_from": str(place),
    }


def header(weights: Weights, target: Path) -> Manifest:
    """A manifest for weights alone, of one rank; tensors and files are filled in by :func:`write`."""
    config = weights.config.model_copy(
        update={"parallel": weights.config.parallel.model_copy(update={"tensor": 1})}
    )
    return Manifest(
        folder=target,
        step=weights.step,
        optimizer_steps=weights.step,
        guide_optimizer_steps=0 if weights.guide else None,
        data_fingerprint=weights.facts.get("data_fingerprint"),
        tensor_parallel=1,
        kinds=("weight",),
        config=config.model_dump(mode="json"),
        shapes={},
        pieces={},
        files={},
        versions=versions(),
        revision=revision(),
        origin=weights.origin,
        alpha=weights.alpha if weights.guide else None,
    )


def write(
    like: Manifest, full: FullTensor, target: Path, *, data: int = 1, texts: Mapping[str, str] | None = None
) -> Manifest:
    """A checkpoint whose manifest is ``like`` but for tensors and files, which come from ``full``.

    ``texts``: files beside, by name.
    """
    config = loading.from_tree(like.config)
    specs = model_tensors(config, guide=like.guide_optimizer_steps is not None)
    p = like.tensor_parallel
    with fresh(target) as folder:
        check_room(
            folder, sum(4 * math.prod(spec.local_shape(p)) * p for spec in specs.values()) * len(like.kinds)
        )
        pieces, files = _write_tensors(folder, specs, like.kinds, full, p, data)
        for name, text in (texts or {}).items():
            write_text(folder / name, text)
            files[name] = File((folder / name).stat().st_size, hash_file(folder / name))
        shapes = {name: spec.shape for name, spec in specs.items()}
        dataclasses.replace(like, folder=folder, shapes=shapes, pieces=pieces, files=files).write()
    return Manifest.read(target)


@contextlib.contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """atomic_io.atomic_folder with ConfigError for what goes wrong with the disk."""
    try:
        with atomic_folder(target) as folder:
            yield folder
    except OSError as error:
        raise ConfigError([f"{target}: not written: {error}"]) from None


def _write_tensors(
    folder: Path, specs: dict[str, TensorSpec], kinds: tuple[str, ...], full: FullTensor, p: int, data: int
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, File]]:
    """One file a rank, all open at once; each tensor is made once and cut into every file."""
    pieces = {name: tuple(_pieces(spec, p, data)) for name, spec in specs.items()}
    entries: dict[str, dict[str, TensorEntry]] = {_file(rank): {} for rank in range(p * data)}
    for name, tensor_pieces in pieces.items():
        for piece in tensor_pieces:
            entries[piece.file] |= {
                piece.key(kind, name): TensorEntry(torch.float32, (piece.numel,)) for kind in kinds
            }
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(TensorFile(folder / name, file_entries))
            for name, file_entries in entries.items()
        }
        for name, spec in specs.items():
            for kind in kinds:
                tensor = full(name, kind)
                flat = tensor
                for rank, rank_pieces in itertools.groupby(pieces[name], lambda piece: piece.tensor_rank):
                    flat = (tensor if spec.cut is None or p == 1 else shard(tensor, spec, p, rank)).reshape(
                        -1
                    )
                    for piece in rank_pieces:
                        files[piece.file].add(
                            piece.key(kind, name), flat[piece.start : piece.start + piece.numel]
                        )
                del tensor, flat  # before the next one comes
        return pieces, {name: File(*file.close()) for name, file in files.items()}


def _pieces(spec: TensorSpec, p: int, data: int) -> Iterator[Piece]:
    """Each tensor-parallel rank's part in ``data`` ranges, as even as they come.

    What all of them hold is the first one's.
    """
    numel = math.prod(spec.local_shape(p))
    for tensor_rank in range(p if spec.cut is not None else 1):
        for data_rank in range(data):
            start, stop = numel * data_rank // data, numel * (data_rank + 1) // data
            if start < stop:
                yield Piece(tensor_rank, start, stop - start, _file(data_rank * p + tensor_rank))


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
