"""Which format a folder or file is of, and its weights, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sffn_dist.checkpoint import manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.weights import Weights
from sffn_dist.config import ConfigError

Format = Literal["checkpoint", "hf", "megatron", "deepspeed", "official"]


def format_of(path: Path) -> Format:
    """By the names of the files in it; raises ConfigError if it is of none."""
    if path.is_file():
        return "official"
    if not path.is_dir():
        raise ConfigError([f"{path}: no such file or folder"])
    if (path / manifest.NAME).exists() or (path / "checkpoints").is_dir():
        return "checkpoint"
    if (path / "zero").is_dir() or (path / "latest_universal").exists():
        return "deepspeed"
    megatron = (".metadata", "common.pt", "latest_checkpointed_iteration.txt")
    if any((path / name).exists() for name in megatron) or next(path.glob("mp_rank_*"), None):
        return "megatron"
    if (path / "config.json").exists():
        return "hf"
    raise ConfigError(
        [f"{path}: neither a checkpoint nor a run of sffn_dist, nor a Hugging Face, Megatron or universal DeepSpeed folder"]
    )


def weights_of(path: Path, overrides: Sequence[str] = ()) -> Weights:
    """The model in ``path``, of any format; ``overrides`` say what the file itself does not. Raises ConfigError."""
    kind = format_of(path)
    if kind == "checkpoint":
        return Reader(manifest.find("source", str(path))).weights()
    if kind == "hf":
        from sffn_dist.checkpoint.hf import source

        return source.read(path)
    if kind == "megatron":
        from sffn_dist.checkpoint import megatron

        return megatron.read(path, overrides)
    if kind == "deepspeed":
        from sffn_dist.checkpoint import universal

        return universal.read(path, overrides).weights
    from sffn_dist.checkpoint import official

    return official.read(path, overrides)
