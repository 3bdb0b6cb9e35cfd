"""Save: each rank writes the fragments it owns, in the background if wanted.

A checkpoint is complete or not there.

    main thread    copy of the rank's fragments to host memory; all that training waits for
    thread         room? -> file of this rank, hashed on the way -> everyone's reports -> rank 0: manifest,
                   rename, prune

The thread's agreement between ranks goes over a gloo group of its own, so it meets no collective of the
training's.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sffn_dist.atomic_io import hash_file, sync
from sffn_dist.checkpoint.manifest import (
    KINDS,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    File,
    Manifest,
    Piece,
)
from sffn_dist.checkpoint.run_folder import PARTIAL, folder_of, prune, replace
from sffn_dist.checkpoint.tensor_file import TensorEntry, TensorFile
from sffn_dist.checkpoint.versions import revision, versions
from sffn_dist.parallel.object_collectives import all_gather_object, broadcast_object
from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import model_tensors

if TYPE_CHECKING:  # megatron-core takes seconds to import, and a conversion has no ranks
    from sffn_dist.parallel.topology import Topology

BLOCK_ELEMENTS = 1 << 28  # of fp32, 1 GiB: what torch's pinned memory rounds up is less than that


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a rank's flattened parameter.

    Writable views of the optimizer's own memory.
    """

    name: str
    start: int
    numel: int
    tensors: Mapping[str, Tensor]  # "weight" (fp32), "exp_avg", "exp_avg_sq": each (numel,)


class SaveError(OSError):
    """A checkpoint could not be written; nothing of it is left."""


@dataclass(frozen=True)
class Position:
    """Where a run is: steps taken, Adam's own counts of them, and the fingerprint of the data."""

    step: int
    optimizer_steps: int
    guide_optimizer_steps: int | None
    data_fingerprint: str | None
    recent_losses: tuple[float, ...] = ()


@dataclass
class _Job:
    """One rank's part of a save."""

    position: Position
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by the key in the file, each (numel,)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    problem: str | None = None

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class Saver:
    """Writes a run's checkpoints; every rank has one and calls it alike.

    ``tokenizer`` is a file that goes into each checkpoint, so that it can be exported without the data.
    Failures do not raise: they are reported by :meth:`pop_failures`, and :meth:`wait` gives None.
    """

    def __init__(self, run_dir: Path, config: Config, topology: Topology, tokenizer: Path | None = None):
        self.run_dir, self.config, self.topology, self.tokenizer = run_dir, config, topology, tokenizer
        self._group = topology.background_group() if topology.world_size > 1 else None
        self._staging, self._thread = _Staging(), threading.Thread()
        self._saved: Path | None = None
        self.seconds = 0.0  # that the last save took
        self._news: list[str] = []

    def save(self, position: Position, fragments: Iterable[Fragment]) -> None:
        """Start to write ``run_dir/checkpoints/step_...``; returns when the state may change again.

        Waits for the save before first.

        ``fragments`` are those of this rank that no other rank also holds: see :func:`owned_fragments`.
        """
        self.wait()
        self._saved = None
        job = _Job(position)
        try:
            self._stage(job, list(fragments))
        except Exception as error:  # whatever it is, every rank must receive it
            job.problem = f"{type(error).__name__}: {error}"
        if self.config.checkpoint.asynchronous:
            self._thread = threading.Thread(target=self._finish, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._finish(job)

    def wait(self, seconds: float | None = None) -> Path | None:
        """The last save's folder once it is there.

        None if it failed, on every rank, or is still being written after ``seconds``.
        """
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return self._saved

    @property
    def writing(self) -> bool:
        """True while a save is being written in the background."""
        return self._thread.is_alive()

    def pop_failures(self) -> list[str]:
        """What went wrong since this was last asked, a sentence each."""
        return [self._news.pop(0) for _ in range(len(self._news))]  # the thread may add to it meanwhile

    def _stage(self, job: _Job, fragments: list[Fragment]) -> None:
        file = f"rank_{self.topology.rank:05d}.safetensors"
        views: dict[str, Tensor] = {}
        for fragment in fragments:
            piece = Piece(self.topology.tensor_parallel_rank, fragment.start, fragment.numel, file)
            job.pieces.setdefault(fragment.name, []).append(piece)
            views |= {
                piece.key(kind, fragment.name): view.detach() for kind, view in fragment.tensors.items()
            }
        job.tensors = self._staging.copy(views) if self.config.checkpoint.asynchronous else views

    def _finish(self, job: _Job) -> None:
        started = time.monotonic()
        try:
            self._saved = self._commit(job)
            self.seconds = time.monotonic() - started
        except SaveError as error:
            self._news.append(str(error))
        except Exception as error:  # e.g. a rank is gone: training will notice by itself
            self._news.append(
                f"checkpoint of step {job.position.step} not written: {type(error).__name__}: {error}"
            )

    def _commit(self, job: _Job) -> Path:
        target = folder_of(self.run_dir, job.position.step)
        temporary = target.with_name(f".{target.name}{PARTIAL}")

        def remove_partial() -> None:  # before the others learn of it: then nothing is left on any rank
            shutil.rmtree(temporary, ignore_errors=True)

        self._agree(
            job, (job.bytes, job.problem), lambda reports: self._make_room(temporary, reports), remove_partial
        )
        report, problem = None, None
        try:
            # in rank 0's folder: a rank that does not see it must not make its own
            report = self._write(temporary, job)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        job.tensors = {}
        self._agree(
            job,
            (report, problem),
            lambda reports: self._publish(temporary, target, job.position, reports),
            remove_partial,
        )
        return target

    def _agree(
        self,
        job: _Job,
        report: tuple[Any, str | None],
        act: Callable[[list[Any]], None],
        remove_partial: Callable[[], None],
    ) -> None:
        """Gather (result, problem) of all ranks; rank 0 then acts on the results.

        Raises SaveError on every rank if anything failed.
        """
        reports = [report] if self._group is None else all_gather_object(report, self._group)
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(reports) if problem]
        if self.topology.is_rank_zero and not problems:
            try:
                act([result for result, _ in reports])
            except Exception as error:
                problems = [f"rank 0: {type(error).__name__}: {error}"]
        if self.topology.is_rank_zero and problems:
            remove_partial()
        if self._group is not None:
            problems = broadcast_object(problems, self._group)
        if problems:
            raise SaveError(f"checkpoint of step {job.position.step} not written: {problems[0]}")

    def _make_room(self, temporary: Path, sizes: list[int]) -> None:
        """An empty folder on a disk with room for what comes; raises OSError."""
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        check_room(temporary, sum(sizes))

    def _write(self, folder: Path, job: _Job) -> tuple[str, File, dict[str, list[Piece]]]:
        name = f"rank_{self.topology.rank:05d}.safetensors"
        entries = {key: TensorEntry(tensor.dtype, tuple(tensor.shape)) for key, tensor in job.tensors.items()}
        with TensorFile(folder / name, entries) as file:
            for key, tensor in job.tensors.items():
                file.add(key, tensor)
            size, digest = file.close()
        return name, File(size, digest), job.pieces

    def _publish(self, temporary: Path, target: Path, position: Position, reports: list[Any]) -> None:
        """Manifest, sync, rename; then what is no longer wanted goes."""
        specs = model_tensors(self.config, guide=position.guide_optimizer_steps is not None)
        pieces = {
            name: tuple(piece for report in reports for piece in report[2].get(name, ())) for name in specs
        }
        files = {name: file for name, file, _ in reports}
        if self.tokenizer is not None:
            files[TOKENIZER] = copy_in(self.tokenizer, temporary / TOKENIZER)
            for name in TOKENIZER_SETTINGS:
                if (beside := self.tokenizer.with_name(name)).is_file():
                    files[name] = copy_in(beside, temporary / name)
        manifest = Manifest(
            folder=temporary,
            step=position.step,
            optimizer_steps=position.optimizer_steps,
            guide_optimizer_steps=position.guide_optimizer_steps,
            data_fingerprint=position.data_fingerprint,
            recent_losses=position.recent_losses,
            tensor_parallel=self.topology.tensor_parallel_size,
            kinds=KINDS,
            config=self.config.model_dump(mode="json"),
            shapes={name: spec.shape for name, spec in specs.items()},
            pieces=pieces,
            files=files,
            versions=versions(),
            revision=revision(),
        )
        manifest.check_sizes()  # every rank's file is where this one looks
        manifest.write()
        sync(temporary)
        replace(temporary, target)
        # the save is there; tidying up has its next chance with the next one
        with contextlib.suppress(OSError):
            prune(self.run_dir, self.config.checkpoint.keep, self.config.checkpoint.keep_every, target)


class _Staging:
    """Host memory that a save is copied into, pinned for CUDA, kept for the next save of the same tensors.

    In blocks: torch rounds pinned memory up to a power of two, one buffer of 8.9 GB to 16 GiB.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._layout: list[list[int]] = []  # numbers of elements, by block

    def copy(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies (numel,) of fp32 views, valid until the next call."""
        cuda = any(view.is_cuda for view in views.values())
        layout = blocks_of([view.numel() for view in views.values()])
        if layout != self._layout:
            self._blocks, self._layout = [], []  # gone before the new ones come
            if cuda:  # else torch keeps them for itself; not every version can give them back
                getattr(torch.accelerator, "empty_host_cache", lambda: None)()
            self._blocks = [torch.empty(sum(sizes), pin_memory=cuda) for sizes in layout]
            self._layout = layout
        copies = [
            part for block, sizes in zip(self._blocks, layout, strict=True) for part in block.split(sizes)
        ]
        for copy, view in zip(copies, views.values(), strict=True):
            assert view.dtype == copy.dtype
            copy.copy_(view.view(-1), non_blocking=True)
        if cuda:
            torch.cuda.current_stream().synchronize()
        return dict(zip(views, copies, strict=True))


def blocks_of(sizes: Sequence[int], most: int = BLOCK_ELEMENTS) -> list[list[int]]:
    """``sizes`` in order, put together to blocks of at most ``most``; a larger one is a block by itself."""
    blocks: list[list[int]] = []
    room = 0
    for size in sizes:
        if not blocks or size > room:
            blocks.append([])
            room = most
        blocks[-1].append(size)
        room -= size
    return blocks


def owned_fragments(fragments: Iterable[Fragment], config: Config, topology: Topology) -> Iterable[Fragment]:
    """Those that this rank writes: of equal copies (ZeRO 0, tensors replicated over the tensor-parallel
    group) the first rank's.
    """
    specs = model_tensors(config, guide=True)
    for fragment in fragments:
        if config.zero.stage == 0 and topology.data_parallel_rank > 0:
            continue
        if specs[fragment.name].cut is None and topology.tensor_parallel_rank > 0:
            continue
        yield fragment


def check_room(folder: Path, needed: int) -> None:
    """Raises OSError where the disk of ``folder`` has no room for ``needed`` bytes, and some for the
    manifest.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + (1 << 20):
        raise OSError(
            f"{needed / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free on the disk of {folder.parent}; "
            "make room, or lower checkpoint.keep"
        )


def copy_in(source: Path, target: Path) -> File:
    """Copy a small file beside the tensors."""
    shutil.copyfile(source, target)
    sync(target)
    return File(target.stat().st_size, hash_file(target))
