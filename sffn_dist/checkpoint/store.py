"""Save and load: each rank writes the fragments it owns, any layout reads what it needs, tensor by tensor."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sffn_dist.checkpoint.manifest import FORMAT, NAME, VERSION, BrokenCheckpoint, Manifest, Piece, checkpoints, folder_of
from sffn_dist.config import Config
from sffn_dist.durable import sync
from sffn_dist.parallel.split import shard, unshard
from sffn_dist.parallel.topology import Topology
from sffn_dist.shapes import model_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
PARTIAL = ".partial"


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start+numel of a rank's flattened parameter, as writable views of the optimiser's own memory."""

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


def save(run_dir: Path, position: Position, fragments: Iterable[Fragment], config: Config, topology: Topology) -> Path:
    """Write ``run_dir/checkpoints/step_...`` by all ranks; complete or not there.

    ``fragments`` are those of this rank that no other rank also holds: see :func:`owned`. Raises SaveError on every rank if any failed.
    """
    target = folder_of(run_dir, position.step)
    temporary = target.with_name(f".{target.name}{PARTIAL}")
    if topology.main:
        shutil.rmtree(temporary, ignore_errors=True)
    _barrier()
    file, pieces, problem = f"rank_{topology.rank:05d}.safetensors", {}, None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        pieces = _write_fragments(temporary / file, fragments, topology)
    except Exception as error:  # whatever it is, every rank must hear of it
        problem = f"rank {topology.rank}: {type(error).__name__}: {error}"
    reports: list[Any] = [None] * topology.world
    dist.all_gather_object(reports, (file, pieces, problem))
    problems = [report[2] for report in reports if report[2]]
    if topology.main and not problems:
        try:
            _publish(temporary, target, position, config, topology, reports)
        except Exception as error:
            problems = [f"rank 0: {type(error).__name__}: {error}"]
    if topology.main and problems:  # before the others hear of it: who catches SaveError finds nothing left, on any rank
        shutil.rmtree(temporary, ignore_errors=True)
    verdict = [problems]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise SaveError(f"checkpoint of step {position.step} not written: {verdict[0][0]}")
    return target


def owned(fragments: Iterable[Fragment], config: Config, topology: Topology) -> Iterable[Fragment]:
    """Those that this rank writes: of equal copies (ZeRO 0, tensors replicated over the tensor-parallel group) the first rank's."""
    specs = model_tensors(config, guide=True)
    for fragment in fragments:
        if config.zero.stage == 0 and topology.data_rank > 0:
            continue
        if specs[fragment.name].cut is None and topology.tensor_rank > 0:
            continue
        yield fragment


def _write_fragments(path: Path, fragments: Iterable[Fragment], topology: Topology) -> dict[str, list[Piece]]:
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, list[Piece]] = {}
    for fragment in fragments:
        piece = Piece(topology.tensor_rank, fragment.start, fragment.numel, path.name)
        pieces.setdefault(fragment.name, []).append(piece)
        for kind, view in fragment.tensors.items():
            tensors[piece.key(kind, fragment.name)] = view.detach().to("cpu", copy=True)
    save_file(tensors, path)
    sync(path)
    return pieces


def _publish(temporary: Path, target: Path, position: Position, config: Config, topology: Topology, reports: list[Any]) -> None:
    """Manifest, sync, rename."""
    specs = model_tensors(config, guide=position.guide_optimizer_steps is not None)
    tensors: dict[str, dict[str, Any]] = {name: {"shape": list(spec.shape), "pieces": []} for name, spec in specs.items()}
    for _, pieces, _ in reports:
        for name, some in pieces.items():
            tensors[name]["pieces"] += [asdict(piece) for piece in some]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(position),
        "tensor_parallel": topology.tensor,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "revision": revision(),
        "files": {report[0]: (temporary / report[0]).stat().st_size for report in reports},
        "tensors": tensors,
    }
    (temporary / NAME).write_text(json.dumps(manifest), encoding="utf-8")
    sync(temporary / NAME)
    sync(temporary)
    older = target.with_name(f".{target.name}.older{PARTIAL}")
    if target.exists():  # the same step saved before, broken since
        target.rename(older)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(older, ignore_errors=True)


def prune(run_dir: Path, keep: int, saved: Path) -> None:
    """Remove all checkpoints but the ``keep`` newest complete ones up to ``saved``, the one just written.

    What lies beyond it is of a run that went on from an older checkpoint, because those were broken.
    """
    complete = []
    for folder in checkpoints(run_dir):
        try:
            Manifest.read(folder)
        except BrokenCheckpoint:
            continue
        if folder.name <= saved.name:
            complete.append(folder)
    for folder in checkpoints(run_dir):
        if folder not in complete[-keep:] and folder != saved:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(run_dir: Path) -> None:
    """Remove what interrupted saves left; only the holder of the run's lock may."""
    for folder in (run_dir / "checkpoints").glob(f".step_*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


class Reader:
    """Reads tensors of a checkpoint for any layout: from pieces to a rank's part to the full tensor to another rank's part."""

    def __init__(self, manifest: Manifest, config: Config):
        self.manifest = manifest
        self.specs = model_tensors(config, guide=True)
        self._open: dict[str, Any] = {}

    def _part(self, name: str, kind: str, tensor_rank: int) -> Tensor:
        """What one tensor-parallel rank of the saved run held."""
        spec, p = self.specs[name], self.manifest.tensor_parallel
        part = torch.full(spec.local_shape(p), float("nan"), dtype=torch.float32)
        flat, covered = part.view(-1), 0
        for piece in self.manifest.pieces[name]:
            if piece.tensor_rank == (tensor_rank if spec.cut is not None else 0):
                if piece.file not in self._open:
                    self._open[piece.file] = safe_open(self.manifest.folder / piece.file, framework="pt")
                flat[piece.start : piece.start + piece.numel] = self._open[piece.file].get_tensor(piece.key(kind, name))
                covered += piece.numel
        if covered != flat.numel():
            raise ValueError(f"{self.manifest.folder}: {kind} of {name} has {covered} of {flat.numel()} elements")
        return part

    def full(self, name: str, kind: str = "weight") -> Tensor:
        """The full tensor, fp32."""
        spec, p = self.specs[name], self.manifest.tensor_parallel
        return unshard([self._part(name, kind, rank) for rank in range(p if spec.cut is not None else 1)], spec)

    def local(self, name: str, topology: Topology, kind: str = "weight") -> Tensor:
        """The part of this rank's layout, fp32."""
        if topology.tensor == self.manifest.tensor_parallel:
            return self._part(name, kind, topology.tensor_rank)
        return shard(self.full(name, kind), self.specs[name], topology.tensor, topology.tensor_rank)

    @torch.no_grad()
    def restore(self, fragments: Iterable[Fragment], topology: Topology, kinds: tuple[str, ...] = KINDS) -> None:
        """Copy fp32 weights and moments (or only some ``kinds``) into the optimiser's fragments, bit for bit."""
        for fragment in fragments:
            for kind in kinds:
                flat = self.local(fragment.name, topology, kind).view(-1)
                fragment.tensors[kind].copy_(flat[fragment.start : fragment.start + fragment.numel])


def versions() -> dict[str, str]:
    """Versions of what computed the weights."""
    found = {"python": sys.version.split()[0]}
    for name in ("sffn_dist", "torch", "megatron-core", "deepspeed", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def revision() -> str | None:
    """The git revision of the code, "+" after it if it was changed since."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        state = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "") if head.returncode == 0 else None


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
