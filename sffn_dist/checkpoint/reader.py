"""Read tensors of a checkpoint for any layout: from pieces to a rank's part to the full tensor to another
rank's part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sffn_dist.checkpoint.manifest import (
    KINDS,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    BrokenCheckpoint,
    Manifest,
    missing_tensors,
)
from sffn_dist.checkpoint.run_folder import find_checkpoint
from sffn_dist.checkpoint.weights import Weights
from sffn_dist.checkpoint.writer import Fragment
from sffn_dist.parallel.split import part_view, shard
from sffn_dist.spec import loading, schedule
from sffn_dist.spec.split_table import model_tensors

if TYPE_CHECKING:  # megatron-core takes seconds to import, and a conversion has no ranks
    from sffn_dist.parallel.topology import Topology


class Reader:
    """A checkpoint's tensors; what is not asked for is not read.

    Raises ConfigError if this version cannot read its config, BrokenCheckpoint if tensors are missing.
    """

    def __init__(self, manifest: Manifest):
        self.manifest, self.config = manifest, loading.from_tree(manifest.config)
        self.guide = manifest.guide_optimizer_steps is not None
        self.specs = model_tensors(self.config, guide=self.guide)
        for problem in missing_tensors(manifest, {name: spec.shape for name, spec in self.specs.items()}):
            raise BrokenCheckpoint(f"{manifest.folder}: {problem}")
        self._open: dict[str, Any] = {}

    def part(self, name: str, kind: str, tensor_rank: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start .. stop of what one tensor-parallel rank of the saved run held, flat.

        Only these are read.
        """
        spec, p = self.specs[name], self.manifest.tensor_parallel
        rank = tensor_rank if spec.cut is not None else 0
        stop = torch.Size(spec.local_shape(p)).numel() if stop is None else stop
        flat, covered = torch.empty(stop - start), 0
        for piece in self.manifest.pieces[name]:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if piece.tensor_rank == rank and first < last:
                read = self._slice(piece.file, piece.key(kind, name), first - piece.start, last - piece.start)
                flat[first - start : last - start] = read
                covered += last - first
        if covered != stop - start:
            raise BrokenCheckpoint(
                f"{self.manifest.folder}: {kind} of {name} has {covered} of {stop - start} elements"
            )
        return flat

    def _slice(self, file: str, key: str, start: int, stop: int) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.manifest.folder / file, framework="pt")
            return self._open[file].get_slice(key)[start:stop]
        except (SafetensorError, OSError) as error:
            raise BrokenCheckpoint(f"{self.manifest.folder / file}: {key}: {error}") from None

    def full(self, name: str, kind: str = "weight") -> Tensor:
        """The full tensor, fp32; in memory besides it is one rank's part."""
        spec, p = self.specs[name], self.manifest.tensor_parallel
        if spec.cut is None or p == 1:
            return self.part(name, kind, 0).view(spec.shape)
        full = torch.empty(spec.shape)
        for rank in range(p):
            part_view(full, spec, p, rank).copy_(self.part(name, kind, rank).view(spec.cut.local_view(p)))
        return full

    def local(
        self, name: str, kind: str, tensor: int, tensor_rank: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Elements start .. stop of the part of rank ``tensor_rank`` of ``tensor``, flat."""
        if tensor == self.manifest.tensor_parallel:
            return self.part(name, kind, tensor_rank, start, stop)
        return shard(self.full(name, kind), self.specs[name], tensor, tensor_rank).view(-1)[start:stop]

    @torch.no_grad()
    def restore(
        self, fragments: Iterable[Fragment], topology: Topology, kinds: tuple[str, ...] = KINDS
    ) -> None:
        """Copy fp32 weights and moments (or only some ``kinds``) into the optimiser's fragments, bit for
        bit.
        """
        for fragment in fragments:
            for kind in kinds:
                place = (
                    topology.tensor_parallel_size,
                    topology.tensor_parallel_rank,
                    fragment.start,
                    fragment.start + fragment.numel,
                )
                fragment.tensors[kind].copy_(self.local(fragment.name, kind, *place))

    @torch.no_grad()
    def load(self, model: nn.Module, topology: Topology) -> None:
        """Set this rank's part of a model without an engine: its parameters' weights, rounded to their
        type.
        """
        for name, parameter in model.named_parameters():
            local = self.local(name, "weight", topology.tensor_parallel_size, topology.tensor_parallel_rank)
            parameter.copy_(local.view(parameter.shape))

    def weights(self) -> Weights:
        """The checkpoint's model, as it would be evaluated at its step."""
        manifest, run_schedule = self.manifest, schedule.build_schedule(self.config)
        alpha = run_schedule.alpha(manifest.step) if manifest.alpha is None else manifest.alpha
        facts = {
            "data_fingerprint": manifest.data_fingerprint,
            "revision": manifest.revision,
            "versions": manifest.versions,
        }
        return Weights(
            config=self.config,
            full=self.full,
            origin=manifest.origin or str(manifest.folder),
            guide=self.guide,
            alpha=alpha if self.guide else 0.0,
            step=manifest.step,
            tokenizer=self._text(TOKENIZER),
            tokenizer_settings={
                name: text for name in TOKENIZER_SETTINGS if (text := self._text(name)) is not None
            },
            trained=manifest.data_fingerprint is not None,
            facts={**facts, "results": _results(manifest)},
        )

    def _text(self, name: str) -> str | None:
        """A file beside the tensors, or None if the checkpoint has none of that name."""
        path = self.manifest.folder / name
        try:
            return path.read_text(encoding="utf-8") if name in self.manifest.files else None
        except (OSError, UnicodeError) as error:
            raise BrokenCheckpoint(f"{path}: {error}") from None


def read_weights(path: Path, overrides: Sequence[str] = ()) -> Weights:
    """The model in a checkpoint or a run, which holds all of its config itself."""
    return Reader(find_checkpoint("source", str(path))).weights()


def _results(manifest: Manifest) -> dict[str, float]:
    """What the run measured at the checkpoint's step, where it stands in its run's folder."""
    try:
        lines = (manifest.folder.parents[1] / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return next((row for row in reversed(rows) if row["step"] == manifest.step), {})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
