"""What a checkpoint folder says of itself: one ``manifest.json`` beside the ranks' safetensors files. Standard library only.

    run.dir/checkpoints/step_00000120/manifest.json
                                      rank_00000.safetensors ...

A folder gets its name by a rename after everything in it is on disk: a checkpoint is complete or not there. ``step`` counts the steps
taken, so the next step to run is ``step`` itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_dist.config import ConfigError

FORMAT, VERSION = "sffn_dist checkpoint", 1
NAME = "manifest.json"
log = logging.getLogger(__name__)


class BrokenCheckpoint(ValueError):
    """A folder that is not a complete checkpoint, with the reason."""


@dataclass(frozen=True)
class Piece:
    """Where elements start .. start+numel of one tensor-parallel rank's flattened part of a tensor lie."""

    tensor_rank: int
    start: int
    numel: int
    file: str

    def key(self, kind: str, name: str) -> str:
        """The entry's name in the safetensors file; ``kind`` is weight, exp_avg or exp_avg_sq."""
        return f"{kind}/{name}/{self.tensor_rank}/{self.start}"


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint."""

    folder: Path
    step: int
    optimizer_steps: int  # Adam's own count: behind ``step`` by the steps that were skipped for a non-finite gradient
    guide_optimizer_steps: int | None  # the guide's own: it counts from where guidance begins; None without a guide
    tensor_parallel: int
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, tuple[Piece, ...]]
    config: dict[str, Any]
    data_fingerprint: str | None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises BrokenCheckpoint if the folder is not a checkpoint, or a file of it is missing or has another size."""
        try:
            tree = json.loads((folder / NAME).read_text(encoding="utf-8"))
            if tree["format"] != FORMAT or tree["version"] != VERSION:
                raise BrokenCheckpoint(
                    f"{folder}: format {tree['format']!r} {tree['version']}, this reads {FORMAT!r} {VERSION}"
                )
            for name, size in tree["files"].items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise BrokenCheckpoint(f"{folder / name}: {found} bytes, the manifest says {size}")
            tensors = tree["tensors"].items()
            return cls(
                folder=folder,
                step=int(tree["step"]),
                optimizer_steps=int(tree["optimizer_steps"]),
                guide_optimizer_steps=None if (count := tree.get("guide_optimizer_steps")) is None else int(count),
                tensor_parallel=int(tree["tensor_parallel"]),
                shapes={name: tuple(map(int, entry["shape"])) for name, entry in tensors},
                pieces={name: tuple(Piece(**piece) for piece in entry["pieces"]) for name, entry in tensors},
                config=dict(tree["config"]),
                data_fingerprint=tree["data_fingerprint"],
            )
        except BrokenCheckpoint:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BrokenCheckpoint(f"{folder}: not a complete checkpoint: {type(error).__name__}: {error}") from None


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def newest(run_dir: Path) -> Manifest | None:
    """The newest complete checkpoint of a run; broken ones are skipped and named in a warning.

    None if there is none at all. Raises ConfigError if there are some and all are broken: starting anew would overwrite the run.
    """
    reasons = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            found = Manifest.read(folder)
        except BrokenCheckpoint as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            log.warning("checkpoint skipped: %s", reason)
        return found
    if reasons:
        raise ConfigError([f"run.dir = {str(run_dir)!r}: no checkpoint in it is complete: {reason}" for reason in reasons])
    return None


def find(key: str, path: str) -> Manifest:
    """The checkpoint that ``path`` (a checkpoint, or a run whose newest is meant) names; raises ConfigError naming ``key``."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError([f"{key} = {path!r}: no such folder; must be a checkpoint or a run.dir"])
    if (folder / NAME).exists():
        try:
            return Manifest.read(folder)
        except BrokenCheckpoint as error:
            raise ConfigError([f"{key} = {path!r}: {error}"]) from None
    try:
        found = newest(folder)
    except ConfigError as error:
        raise ConfigError([f"{key} = {path!r}: {problem}" for problem in error.problems]) from None
    if found is None:
        raise ConfigError([f"{key} = {path!r}: holds no complete checkpoint"])
    return found


def missing_tensors(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """A sentence for each tensor of ``shapes`` that the checkpoint lacks or has in another shape."""
    for name, shape in shapes.items():
        if name not in manifest.shapes:
            yield f"{name} is not in it"
        elif manifest.shapes[name] != shape:
            yield f"{name} is {list(manifest.shapes[name])} there, {list(shape)} here"
