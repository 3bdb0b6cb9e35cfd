"""What a checkpoint folder says of itself: one ``manifest.json`` beside the ranks' safetensors files.

Standard library only.

    run.dir/checkpoints/step_00000120/manifest.json
                                      tokenizer.json
                                      rank_00000.safetensors ...

A folder gets its name by a rename after everything in it is on disk: a checkpoint is complete or not there.
The manifest holds every file's size and sha256, and its own: what a disk did to a checkpoint later is seen
before anything of it is used. ``step`` counts the steps taken, so the next step to run is ``step`` itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sffn_dist.atomic_io import hash_file, sync, write_text
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.renamed_keys import translate

FORMAT, VERSION = "sffn_dist checkpoint", 2
NAME, MARK, TOKENIZER = "manifest.json", "BROKEN", "tokenizer.json"
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
    optimizer_steps: (
        int  # Adam's own count: behind ``step`` by the steps that were skipped for a non-finite gradient
    )
    guide_optimizer_steps: (
        int | None
    )  # the guide's own: it counts from where guidance begins; None without a guide
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
    recent_losses: tuple[
        float, ...
    ] = ()  # of the last accepted steps, nats: what the next ones are judged by
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
            found = cls._parse(folder, tree)
            found.check_sizes()
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
        return found

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
        named = {piece.file for pieces in self.pieces.values() for piece in pieces}
        for name in {**self.files, **dict.fromkeys(named)}:
            if Path(name).name != name or name not in self.files:
                raise BrokenCheckpoint(f"{self.folder}: file {name!r} is not one of its own")
            found = (self.folder / name).stat().st_size
            if found != self.files[name].bytes:
                raise BrokenCheckpoint(
                    f"{self.folder / name}: {found} bytes, the manifest says {self.files[name].bytes}"
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
                found = hash_file(path)
            except OSError as error:
                problems.append(UnreadableCheckpoint(f"{path}: cannot be read: {error}"))
                continue
            if found != stated:
                problems.append(
                    BrokenCheckpoint(f"{path}: sha256 {found[:12]}..., the manifest says {stated[:12]}...")
                )
        return problems

    def mark(self, reason: str) -> None:
        """Leave word in the folder that it is broken, so that no start tries it again.

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
    plain = json.loads(json.dumps(tree))
    return json.dumps({**plain, "sha256": _hash(plain)})


def _hash(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return str(error)


# --------------------------------------------------------------------------------------------- a run's folder


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, oldest first.

    Raises OSError where they cannot be listed (a glob would find none).
    """
    try:
        names = os.listdir(run_dir / "checkpoints")
    except FileNotFoundError:
        return []
    steps = {
        name: name.removeprefix("step_") for name in names if name.startswith("step_") and name.isascii()
    }
    found = sorted(
        (name for name, step in steps.items() if step.isdecimal()), key=lambda name: int(steps[name])
    )
    return [run_dir / "checkpoints" / name for name in found]


def latest_checkpoint(
    run_dir: Path, besides: Container[Path] = (), up_to: int | None = None
) -> Manifest | None:
    """The newest complete checkpoint of a run; broken ones are skipped and named in a warning.

    Content is not read: see ``damage``.

    ``up_to``: the last step that it may be of.

    None if there is none at all. Raises ConfigError if there are some and all are broken (or among
    ``besides``, already known to be), or if they cannot be listed: starting anew would overwrite the run.
    """
    reasons: list[str] = []
    told = 0
    try:
        folders = checkpoints(run_dir)
    except OSError as error:
        raise ConfigError(
            [f"run.dir = {str(run_dir)!r}: its checkpoints cannot be listed: {error}"]
        ) from None
    for folder in reversed(folders):
        if up_to is not None and int(folder.name[5:]) > up_to:
            continue
        if folder in besides:
            reasons.append(f"{folder}: its content is damaged, see above")
            told = len(reasons)  # those before it by the call that found it
            continue
        try:
            found = Manifest.read(folder)
        except BrokenCheckpoint as error:
            reasons.append(str(error))
            continue
        for reason in reasons[told:]:
            log.warning("checkpoint skipped: %s", reason)
        return found
    if reasons:
        raise ConfigError(
            [f"run.dir = {str(run_dir)!r}: no checkpoint in it is complete: {reason}" for reason in reasons]
        )
    return None


def find_checkpoint(key: str, path: str) -> Manifest:
    """The checkpoint that ``path`` (a checkpoint, or a run whose newest is meant) names; raises
    ConfigError naming ``key``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError([f"{key} = {path!r}: no such folder; must be a checkpoint or a run.dir"])
    if (folder / NAME).exists():
        try:
            return Manifest.read(folder)
        except BrokenCheckpoint as error:
            raise ConfigError([f"{key} = {path!r}: {error}"]) from None
    try:
        found = latest_checkpoint(folder)
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


def prune(run_dir: Path, keep: int, keep_every: int, saved: Path) -> None:
    """Remove what is no longer wanted once ``saved``, which was just written, is there.

    Kept: the ``keep`` newest complete ones up to ``saved``, those of steps that ``keep_every`` divides, what
    another version of this code wrote or the disk does not read, and whatever lies beyond ``saved``: a start
    may have gone on from an older one for a disk's bad hour.
    """
    complete, broken = [], []
    for folder in checkpoints(run_dir):
        if int(folder.name[5:]) > int(saved.name[5:]):
            break
        try:
            Manifest.read(folder)
        except UnreadableCheckpoint:
            continue
        except BrokenCheckpoint:
            broken.append(folder)
            continue
        complete.append(folder)
    kept = {
        saved,
        *complete[-keep:],
        *(folder for folder in complete if keep_every and int(folder.name[5:]) % keep_every == 0),
    }
    for folder in (*complete, *broken):
        if folder not in kept:
            remove(folder)


def remove(folder: Path) -> None:
    """The manifest goes first: whatever interrupts the rest leaves no checkpoint that looks complete."""
    with contextlib.suppress(OSError):  # it is only tidying up: a save that is there must not fail by it
        if not folder.is_dir():
            folder.unlink()
            return
        (folder / NAME).unlink(missing_ok=True)
        sync(folder)
    shutil.rmtree(folder, ignore_errors=True)
