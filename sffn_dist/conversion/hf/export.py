"""``export``: a model's weights -> a folder that transformers loads.

    merged       LlamaForCausalLM or Starcoder2ForCausalLM, feed-forward factors multiplied out and guides
                 folded in
    structured   SffnForCausalLM (modeling_sffn.py, which travels with the folder): the factors as they are

Tensors are read, cut and written one at a time, so memory holds about twice the largest. The folder is
written beside its place and renamed into it: it is whole or not there.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sffn_dist import strict_json
from sffn_dist.atomic_io import sync
from sffn_dist.checkpoint.tensor_file import TensorEntry, TensorFile
from sffn_dist.checkpoint.weights import Weights, finite, merged
from sffn_dist.checkpoint.writer import check_room
from sffn_dist.conversion.hf import config_json, describe, names
from sffn_dist.conversion.hf.card import card
from sffn_dist.conversion.hf.describe import FFN, DType
from sffn_dist.conversion.hf.names import Family
from sffn_dist.data.tokenizer import encoding_as_trained
from sffn_dist.data.tokenizer_files import token_text
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import model_tensors

TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODELING = Path(__file__).with_name("modeling_sffn.py")
Shard = dict[str, TensorEntry]


def export(
    weights: Weights, folder: Path, *, ffn: FFN, dtype: DType, shard_bytes: int = 5_000_000_000
) -> Path:
    """Write ``folder`` and return it; files of tensors hold at most ``shard_bytes`` each, or one tensor.

    Raises:
        ConfigError: ``folder`` is there already, another export writes it, or no architecture fits, or a
            tensor holds NaN or inf; nothing is changed then.
    """
    if ffn not in ("merged", "structured") or dtype not in TORCH_TYPES or shard_bytes < 1:
        raise ConfigError(
            [
                f"ffn = {ffn!r}, dtype = {dtype!r}, shard_bytes = {shard_bytes!r}: merged or structured; "
                f"fp32 "
                f"or bf16; 1 or more"
            ]
        )
    family = describe.family_of(weights.config, ffn)
    special = describe.special_of(weights)
    weights = dataclasses.replace(weights, tokenizer=_tokenizer(weights, special))
    temporary = folder.with_name(f".{folder.name}.partial")
    _refuse_existing(folder)
    _begin(temporary, folder)
    try:
        written = merged(weights) if ffn == "merged" else _without_idle_guide(weights)
        _write_tensors(written, temporary, family, dtype, shard_bytes)
        _write_rest(written, weights, temporary, folder.name, family, special, ffn, dtype)
        sync(temporary)
        _refuse_existing(folder)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError([f"{folder}: not written: {error}"]) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)
    return folder


def _tokenizer(weights: Weights, special: describe.Special) -> str | None:
    """Its tokenizer.json; of a model trained here, one that puts before a text what training put there."""
    if weights.tokenizer is None or not weights.trained:
        return weights.tokenizer
    bos = token_text(special.tokenizer.get("bos_token")) if weights.config.data.bos else None
    return encoding_as_trained(weights.tokenizer, bos)


def _refuse_existing(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            [f"{folder}: exists; an export overwrites nothing: name another folder, or remove it"]
        )


def _begin(temporary: Path, folder: Path) -> None:
    if temporary.exists():
        raise ConfigError(
            [f"{temporary} exists: another export writes {folder}, or one was killed; remove it if none does"]
        )
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be written: {error}"]) from None


def _without_idle_guide(weights: Weights) -> Weights:
    """Weights whose config sets ``guide`` of a model without structured layers have none to keep."""
    return weights if weights.config.structured else dataclasses.replace(weights, guide=False, alpha=0.0)


# ---------------------------------------------------------------------------------------------------- tensors


def plan(weights: Weights, family: Family, dtype: DType, shard_bytes: int) -> list[Shard]:
    """What goes into each file, in the order in which it is written."""
    shards: list[Shard] = [{}]
    used = 0
    for name, spec in model_tensors(weights.config, guide=weights.guide).items():
        for other, shape in names.shapes(family, name, spec.shape, weights.config).items():
            entry = TensorEntry(TORCH_TYPES[dtype], shape)
            if shards[-1] and used + entry.bytes > shard_bytes:
                shards.append({})
                used = 0
            shards[-1][other] = entry
            used += entry.bytes
    return shards


def _tensors(weights: Weights, family: Family, dtype: DType) -> Iterator[tuple[str, torch.Tensor]]:
    for name, spec in model_tensors(weights.config, guide=weights.guide).items():
        tensor = weights.full(name)
        if tuple(tensor.shape) != spec.shape:
            raise ConfigError(
                [f"{weights.origin}: {name} is {list(tensor.shape)}, must be {list(spec.shape)}"]
            )
        for other, part in names.split(family, name, tensor, weights.config):
            # rounded, as values beyond a type's range become infinite
            yield other, finite(part.to(TORCH_TYPES[dtype]), f"{name} ({other})", weights.origin)
        del tensor, part  # before the next one is read: only one is in memory


@torch.no_grad()
def _write_tensors(weights: Weights, folder: Path, family: Family, dtype: DType, shard_bytes: int) -> None:
    shards = plan(weights, family, dtype, shard_bytes)
    files = (
        [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) > 1
        else [SINGLE]
    )
    check_room(folder, sum(entry.bytes for shard in shards for entry in shard.values()))
    tensors = _tensors(weights, family, dtype)
    for file, shard in zip(files, shards, strict=True):
        with TensorFile(folder / file, shard, {"format": "pt"}) as target:
            for _ in shard:
                target.add(*next(tensors))
            target.close()
    if len(shards) > 1:
        entries = [entry for shard in shards for entry in shard.values()]
        total = {
            "total_size": sum(entry.bytes for entry in entries),
            "total_parameters": sum(math.prod(e.shape) for e in entries),
        }
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


# ------------------------------------------------------------------------------------------------- the others


def _write_rest(
    weights: Weights,
    source: Weights,
    folder: Path,
    name: str,
    family: Family,
    special: describe.Special,
    ffn: FFN,
    dtype: DType,
) -> None:
    alpha = weights.alpha if weights.guide else None
    tree = describe.config_json(weights.config, family, dtype, special, alpha, weights.step)
    _write_json(folder / config_json.NAME, tree)
    generation = describe.generation_config_json(special)
    padding = range(weights.config.vocab_unpadded, weights.config.model.vocab)
    if padding:  # rows that stand for no token are never sampled
        generation = {**generation, "suppress_tokens": list(padding)}
    _write_json(folder / "generation_config.json", generation)
    if weights.tokenizer is not None:
        _write_text(folder / "tokenizer.json", weights.tokenizer)
        length = weights.config.model.sequence
        settings = describe.tokenizer_config_json(special, length, source.trained)
        _write_json(folder / "tokenizer_config.json", settings)
    if ffn == "structured":
        _write_text(folder / MODELING.name, MODELING.read_text(encoding="utf-8"))
    text = card(name, weights, source.config, ffn, dtype)
    _write_text(folder / "README.md", text)


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    _write_text(path, strict_json.dumps(tree, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
