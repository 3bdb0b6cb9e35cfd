"""The description in a checkpoint folder: one ``manifest.json`` beside the ranks' safetensors files.

Standard library only.

    run.dir/checkpoints/step_00000120/manifest.json
                                      tokenizer.json
                                      rank_00000.safetensors ...

A folder gets its name by a rename after everything in it is on disk: a checkpoint is complete or not there.
The manifest holds every file's size and sha256, and its own: what a disk did to a checkpoint later is seen
before anything of it is used. ``step`` counts the steps taken, so the next step to run is ``step`` itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sffn_dist import strict_json
from sffn_dist.atomic_io import hash_file, write_text
from sffn_dist.spec.renamed_keys import translate

FORMAT, VERSION = "sffn_dist checkpoint", 2
NAME, MARK, TOKENIZER = "manifest.json", "BROKEN", "tokenizer.json"
# what a tokenizer's folder said besides, where it said anything; carried from import to export
TOKENIZER_SETTINGS = ("tokenizer_config.json", "generation_config.json")
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
log = logging.getLogger(__name__)


class BrokenCheckpoint(ValueError):
    """A folder that is not a complete checkpoint, with the reason."""


class UnreadableCheckpoint(BrokenCheckpoint):
    """Of no use here, but maybe elsewhere or later: another version of this code wrote it, or the disk
    answers with errors.
    """


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
class File:
    """Size and hash of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint."""

    folder: Path
    step: int
    # Adam's own count: behind ``step`` by skipped updates and excluded batches
    optimizer_steps: int
    # the guide's own: it counts from where guidance begins; None without a guide
    guide_optimizer_steps: int | None
    data_fingerprint: str | None
    tensor_parallel: int
    kinds: tuple[str, ...]  # of KINDS: an imported model has no moments
    config: dict[str, Any]  # resolved: every key
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, tuple[Piece, ...]]
    files: dict[str, File]
    versions: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    origin: str | None = None  # what it was imported from
    # of the last accepted steps, nats: what the next ones are judged by
    recent_losses: tuple[float, ...] = ()
    alpha: float | None = None  # of an import's guides; None: that of the run's schedule at ``step``

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises BrokenCheckpoint if the folder is not a checkpoint, or a file of it is missing or of
        another size.
        """
        try:
            tree = json.loads((folder / NAME).read_text(encoding="utf-8"))
            if tree["format"] != FORMAT or tree["version"] != VERSION:
                raise UnreadableCheckpoint(
                    f"{folder}: format {tree['format']!r} {tree['version']}, this reads {FORMAT!r} {VERSION}"
                )
            if tree.pop("sha256") != _hash(tree):
                raise BrokenCheckpoint(f"{folder / NAME}: its content has not the sha256 it states")
            manifest = cls._parse(folder, tree)
            manifest.check_sizes()
        except (BrokenCheckpoint, FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error, BrokenCheckpoint):
                raise
            raise BrokenCheckpoint(f"{folder}: not a complete checkpoint: {error}") from None
        except OSError as error:
            raise UnreadableCheckpoint(f"{folder}: cannot be read: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BrokenCheckpoint(
                f"{folder}: not a complete checkpoint: {type(error).__name__}: {error}"
            ) from None
        if (folder / MARK).exists():
            raise BrokenCheckpoint(
                f"{folder}: marked as broken: {_text(folder / MARK)} (delete {MARK} to have it tried again)"
            )
        return manifest

    @classmethod
    def _parse(cls, folder: Path, tree: dict[str, Any]) -> Manifest:
        tensors, guide_steps = tree["tensors"].items(), tree["guide_optimizer_steps"]
        return cls(
            folder=folder,
            step=int(tree["step"]),
            optimizer_steps=int(tree["optimizer_steps"]),
            guide_optimizer_steps=None if guide_steps is None else int(guide_steps),
            data_fingerprint=tree["data_fingerprint"],
            tensor_parallel=int(tree["tensor_parallel"]),
            kinds=tuple(kind for kind in KINDS if kind in tree["kinds"]),
            config=translate(tree["config"]),
            shapes={name: tuple(map(int, entry["shape"])) for name, entry in tensors},
            pieces={name: tuple(Piece(**piece) for piece in entry["pieces"]) for name, entry in tensors},
            files={name: File(**entry) for name, entry in tree["files"].items()},
            versions=dict(tree["versions"]),
            revision=tree["revision"],
            origin=tree["origin"],
            recent_losses=tuple(map(float, tree.get("recent_losses", ()))),
            alpha=None if (alpha := tree.get("alpha")) is None else float(alpha),
        )

    def check_sizes(self) -> None:
        """Raises BrokenCheckpoint or OSError unless every file is there and of its size."""
        listed_files = {piece.file for pieces in self.pieces.values() for piece in pieces}
        for name in {**self.files, **dict.fromkeys(listed_files)}:
            if Path(name).name != name or name not in self.files:
                raise BrokenCheckpoint(f"{self.folder}: file {name!r} is not one of its own")
            size = (self.folder / name).stat().st_size
            if size != self.files[name].bytes:
                raise BrokenCheckpoint(
                    f"{self.folder / name}: {size} bytes, the manifest says {self.files[name].bytes}"
                )

    def write(self) -> None:
        """Put the manifest into its folder, whose other files are there and on disk."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            **{
                key: value for key, value in asdict(self).items() if key not in ("folder", "shapes", "pieces")
            },
            "tensors": {
                name: {"shape": list(shape), "pieces": [asdict(piece) for piece in self.pieces[name]]}
                for name, shape in self.shapes.items()
            },
        }
        write_text(self.folder / NAME, seal(tree))

    def damage(self, names: Iterable[str]) -> list[BrokenCheckpoint]:
        """What is wrong with each of these files whose content has not its hash; reads them whole."""
        problems: list[BrokenCheckpoint] = []
        for name in names:
            path, stated = self.folder / name, self.files[name].sha256
            try:
                actual = hash_file(path)
            except OSError as error:
                problems.append(UnreadableCheckpoint(f"{path}: cannot be read: {error}"))
                continue
            if actual != stated:
                problems.append(
                    BrokenCheckpoint(f"{path}: sha256 {actual[:12]}..., the manifest says {stated[:12]}...")
                )
        return problems

    def mark(self, reason: str) -> None:
        """Mark the folder as broken, so that no start tries it again.

        Where nothing can be written: none.
        """
        try:
            write_text(self.folder / MARK, reason + "\n")
        except OSError as error:
            log.warning("%s: cannot be marked as broken: %s", self.folder, error)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def seal(tree: dict[str, Any]) -> str:
    """The manifest's text, with its own hash in it."""
    plain = json.loads(strict_json.dumps(tree))
    return json.dumps({**plain, "sha256": _hash(plain)})


def _hash(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return str(error)


# --------------------------------------------------------------------------------------------- a run's folder


def missing_tensors(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """A sentence for each tensor of ``shapes`` that the checkpoint lacks or has in another shape."""
    for name, shape in shapes.items():
        if name not in manifest.shapes:
            yield f"{name} is not in it"
        elif manifest.shapes[name] != shape:
            yield f"{name} is {list(manifest.shapes[name])} there, {list(shape)} here"
