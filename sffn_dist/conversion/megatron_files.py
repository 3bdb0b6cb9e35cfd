"""A Megatron checkpoint of either format, as tensors by megatron-core's names, layers numbered over all.

``torch_dist``: megatron_torch_dist.py. Legacy (``torch``):

    iter_0000100/mp_rank_XX[_PPP]/model_optim_rng.pt    torch.save of {"model": state_dict, "args": Namespace,
                                                        "iteration", ...}

    XX is the tensor-parallel and PPP the pipeline-parallel rank; with interleaved stages "model0", "model1",
    ... in place of "model". Each stage counts its layers from 0. Gated linear_fc1 parts are [gate; up] on
    each rank.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sffn_dist.conversion import pickles
from sffn_dist.conversion.megatron_tensor import (
    BESIDE,
    NUMBERED,
    MegatronCheckpoint,
    MegatronTensor,
    beside,
    iteration_of,
)
from sffn_dist.conversion.megatron_torch_dist import torch_dist
from sffn_dist.spec.config import ConfigError

LATEST = "latest_checkpointed_iteration.txt"
RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?")
# tensors cut over tensor-parallel ranks, and along which axis; every rank has all of the others
CUT = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
}


def open_checkpoint(path: Path) -> MegatronCheckpoint:
    """The checkpoint in a folder, or the latest one below it.

    Raises ConfigError if there is none, or it is damaged.
    """
    folder = _iteration_folder(path)
    if (folder / ".metadata").is_file():
        return torch_dist(folder)
    ranks = {match: child for child in sorted(folder.iterdir()) if (match := RANK.fullmatch(child.name))}
    if ranks:
        places = {
            (int(match[1]), int(match[2] or 0)): child / "model_optim_rng.pt"
            for match, child in ranks.items()
        }
        return _legacy(folder, places)
    if (folder / "metadata.json").is_file():
        raise ConfigError(
            [f"{folder}: a distributed checkpoint, but not of the kind torch_dist, which alone is read"]
        )
    raise ConfigError(
        [
            f"{folder}: holds neither .metadata (torch_dist) nor mp_rank_* folders (torch); not a Megatron "
            f"checkpoint"
        ]
    )


def _iteration_folder(path: Path) -> Path:
    if not (path / LATEST).is_file():
        if not path.is_dir():
            raise ConfigError([f"{path}: no such folder"])
        return path
    try:
        text = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"{path / LATEST}: cannot be read: {error}"]) from None
    folder = path / (text if text == "release" else f"iter_{text:0>7}")
    if not re.fullmatch(r"release|[0-9]{1,12}", text) or not folder.is_dir():
        raise ConfigError([f"{path / LATEST}: names {text[:40]!r}, of which there is no folder"])
    return folder


# ------------------------------------------------------------------------------------------------- torch_dist


# ----------------------------------------------------------------------------------------------------- legacy


def _legacy(folder: Path, places: Mapping[tuple[int, int], Path]) -> MegatronCheckpoint:
    tensor, pipeline = (1 + max(place[axis] for place in places) for axis in (0, 1))
    lost = [
        f"mp_rank_{t:02d}_{s:03d}" for t in range(tensor) for s in range(pipeline) if (t, s) not in places
    ]
    if lost:
        raise ConfigError(
            [
                f"{folder}: {', '.join(lost[:4])} of {tensor} x {pipeline} tensor- and pipeline-parallel "
                f"ranks "
                f"is missing"
            ]
        )
    files = {place: pickles.load(path) for place, path in places.items()}
    for place, file in files.items():
        if not isinstance(file, dict) or not any(
            isinstance(file.get(key), dict) for key in ("model", "model0")
        ):
            raise ConfigError([f"{places[place]}: holds no model"])
        if "language_model" in file.get("model", {}):
            raise ConfigError(
                [
                    f"{places[place]}: a model from before megatron-core (language_model); convert it with "
                    f"Megatron-LM first"
                ]
            )
    first = files[0, 0]
    version = first.get("checkpoint_version", 3.0)
    if not isinstance(version, int | float) or version < 2:  # before, rows of linear_qkv lay otherwise
        raise ConfigError([f"{folder}: checkpoint_version = {version!r}, must be at least 2"])
    stages = max(sum(f"model{i}" in file for i in range(100)) for file in files.values()) or 1
    entries, layers = dict[str, MegatronTensor](), 0
    for chunk in range(stages):  # interleaved: the first part of each stage, then the second, ...
        for stage in range(pipeline):
            key = f"model{chunk}" if "model0" in files[0, stage] else "model"
            parts = [_state(places[rank, stage], files[rank, stage].get(key)) for rank in range(tensor)]
            layers += _add(folder, entries, parts, layers)
    keys = [*first, *(key for state in first.values() if isinstance(state, dict) for key in state)]
    unused = beside(key for key in keys if isinstance(key, str))
    arguments = pickles.attributes(first.get("args"))
    return MegatronCheckpoint(folder, entries, arguments, iteration_of(first), unused)


def _state(path: Path, state: object) -> dict[str, Tensor]:
    """Tensors of a state_dict; raises ConfigError naming what is none."""
    if not isinstance(state, dict):
        raise ConfigError([f"{path}: holds no state of the model"])
    tensors = {}
    for key, value in dict.items(state):
        if not isinstance(key, str) or BESIDE.fullmatch(key):
            continue
        if pickles.shape_of(value) is None:
            raise ConfigError([f"{path}: {key} is not a tensor of floating-point numbers"])
        tensors[key] = value
    return tensors


def _add(
    folder: Path, entries: dict[str, MegatronTensor], parts: list[dict[str, Tensor]], before: int
) -> int:
    """Enter one stage's tensors, put together from tensor-parallel ``parts``.

    Returns how many layers the stage has.
    """
    layers = 0
    for key, tensor in parts[0].items():
        pieces = [part.get(key) for part in parts]
        if any(piece is None or piece.shape != tensor.shape for piece in pieces):
            raise ConfigError([f"{folder}: tensor-parallel ranks do not agree on {key}"])
        numbered, name = NUMBERED.fullmatch(key), key
        if numbered:
            layers = max(layers, int(numbered[1]) + 1)
            name = f"decoder.layers.{before + int(numbered[1])}.{numbered[2]}"
        joined = _joined(folder, key, [piece for piece in pieces if piece is not None], parts[0])
        if name in entries:  # the last stage has a copy of the tied embedding
            joined = MegatronTensor(
                joined.shape, functools.partial(_same, folder, name, entries[name], joined)
            )
        entries[name] = joined
    return layers


def _same(folder: Path, name: str, first: MegatronTensor, second: MegatronTensor) -> Tensor:
    """A tensor that two pipeline stages hold; raises ConfigError where theirs differ."""
    tensor = first.read()
    if first.shape != second.shape or not torch.equal(tensor, second.read()):
        raise ConfigError([f"{folder}: pipeline-parallel stages do not agree on {name}"])
    return tensor


def _replicated(folder: Path, key: str, pieces: list[Tensor]) -> Tensor:
    """A tensor that every tensor-parallel rank holds whole; raises ConfigError where theirs differ."""
    if any(not torch.equal(piece, pieces[0]) for piece in pieces[1:]):
        raise ConfigError([f"{folder}: tensor-parallel ranks hold different values of {key}, must be equal"])
    return pickles.full_precision(pieces[0])


def _joined(folder: Path, key: str, pieces: list[Tensor], part: Mapping[str, Tensor]) -> MegatronTensor:
    dim = next((axis for end, axis in CUT.items() if key.endswith(end) and len(pieces) > 1), None)
    if dim is None or pieces[0].dim() <= dim:
        return MegatronTensor(tuple(pieces[0].shape), functools.partial(_replicated, folder, key, pieces))
    shape = tuple(size * (len(pieces) if axis == dim else 1) for axis, size in enumerate(pieces[0].shape))
    gated = False
    if ".linear_fc1." in key:
        second = part.get(key.rpartition(".linear_fc1.")[0] + ".linear_fc2.weight")
        gated = second is not None and second.dim() == 2 and pieces[0].shape[0] == 2 * second.shape[1]

    def read() -> Tensor:
        full = torch.empty(shape)
        sections = full.chunk(2, dim) if gated else (full,)
        for rank, piece in enumerate(pieces):
            for section, half in zip(sections, piece.detach().chunk(len(sections), dim), strict=True):
                section.narrow(dim, rank * half.shape[dim], half.shape[dim]).copy_(half)
        return full

    return MegatronTensor(shape, read)
