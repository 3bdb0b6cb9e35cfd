"""A run that a job will train: its arguments, where it writes, and whether it can start at all. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sffn_dist.checkpoint import manifest
from sffn_dist.data import metadata
from sffn_dist.launch import run_identity
from sffn_dist.spec import loading, validation
from sffn_dist.spec.config import Config
from sffn_dist.telemetry.trackers import check_trackers


@dataclass(frozen=True)
class JobRun:
    """One run of pretrain.py. ``name`` is for people; ``file`` and ``run_dir`` are as the user wrote them."""

    name: str
    file: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> str:
        return str(self.config.run.dir)

    @property
    def arguments(self) -> list[str]:
        """Of pretrain.py; the config's path is absolute, for a job may start elsewhere."""
        return ["--config", str(Path(self.file).absolute()), *self.overrides]

    @property
    def folders(self) -> list[str]:
        """Paths that the run reads and writes, of those that are folders or files."""
        config = self.config
        paths = [self.run_dir, config.data.dir, config.data.tokenizer, config.init_from, str(Path(self.file).absolute().parent)]
        if config.data.source != "stdlib" and not config.data.source.startswith("hf:"):
            paths.append(config.data.source)
        return [path for path in paths if path]


def read(name: str, file: str, overrides: Sequence[str]) -> JobRun:
    """Load a run's config; raises ConfigError."""
    return JobRun(name, file, tuple(overrides), loading.load(file, overrides))


def check(config: Config, world: int) -> None:
    """What pretrain.py refuses before it imports torch, as far as it is the same on every machine; raises ConfigError.

    A job may wait for days: what can be seen now is said now.
    """
    validation.check_world(config, world)
    metadata.check_source(config.data, config.model.vocab)
    check_trackers(config.logging)
    prepared = metadata.locate(config)
    run_identity.check_identity(config, metadata.read_meta(prepared).fingerprint if metadata.is_usable(prepared) else None)
    if config.init_from and manifest.latest_checkpoint(Path(config.run.dir)) is None:
        run_identity.check_source_of_weights(config)
