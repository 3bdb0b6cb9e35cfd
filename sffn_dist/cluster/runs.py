"""A run that a job will train: its arguments, where it writes, and whether it can start at all.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sffn_dist.spec import loading
from sffn_dist.spec.config import Config


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
        paths = [
            self.run_dir,
            config.data.dir,
            config.data.tokenizer,
            config.init_from.path,
            str(Path(self.file).absolute().parent),
        ]
        if config.data.source != "stdlib" and not config.data.source.startswith("hf:"):
            paths.append(config.data.source)
        return [path for path in paths if path]


def read(name: str, file: str, overrides: Sequence[str]) -> JobRun:
    """Load a run's config; raises ConfigError."""
    return JobRun(name, file, tuple(overrides), loading.load(file, overrides))
