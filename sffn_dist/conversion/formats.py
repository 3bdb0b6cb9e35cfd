"""Which format a folder or file is of, and its weights, whichever it is.

Imports no torch until a model is read.

Another format to import from is a module with a reader and a line in :data:`FORMATS`; tools/convert.py has a
command for it then.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sffn_dist.checkpoint import manifest
from sffn_dist.spec.config import ConfigError

if TYPE_CHECKING:
    from sffn_dist.checkpoint.weights import Weights


@dataclass(frozen=True)
class ImportFormat:
    """A format that models come from: how it is recognized, and what reads it.

    ``reader`` is the ``module:function`` to import when a model is read: (path, overrides) -> Weights, which
    raises ConfigError.
    """

    name: str
    says: str  # what messages call it
    recognizes: Callable[[Path], bool]
    reader: str
    imports_dense: bool = False  # its models are dense; an import may put structured layers in place
    takes_overrides: bool = False  # settings that the source does not hold may be given

    def read(self, path: Path, overrides: Sequence[str] = ()) -> Weights:
        """The model in ``path``. Raises ConfigError."""
        weights: Weights = pkgutil.resolve_name(self.reader)(path, overrides)
        return weights


def _holds(*names: str) -> Callable[[Path], bool]:
    """Recognizes folders that hold one of these; a name may be a pattern."""
    return lambda path: any(next(path.glob(name), None) is not None for name in names)


CHECKPOINT, UNIVERSAL, HUGGING_FACE = "checkpoint", "deepspeed", "hf"
# in this order: the first that recognizes a path is taken
FORMATS: tuple[ImportFormat, ...] = (
    ImportFormat(
        "official",
        "the .pth of the paper's authors",
        Path.is_file,
        "sffn_dist.conversion.official:read",
        takes_overrides=True,
    ),
    ImportFormat(
        CHECKPOINT,
        "a checkpoint or a run of sffn_dist",
        _holds(manifest.NAME, "checkpoints/"),
        "sffn_dist.checkpoint.reader:read_weights",
    ),
    ImportFormat(
        UNIVERSAL,
        "a universal DeepSpeed checkpoint",
        _holds("zero/", "latest_universal"),
        "sffn_dist.conversion.deepspeed:read_weights",
    ),
    ImportFormat(
        "megatron",
        "a Megatron checkpoint",
        _holds(".metadata", "common.pt", "latest_checkpointed_iteration.txt", "mp_rank_*"),
        "sffn_dist.conversion.megatron:read",
        imports_dense=True,
        takes_overrides=True,
    ),
    ImportFormat(
        HUGGING_FACE,
        "a Hugging Face folder",
        _holds("config.json"),
        "sffn_dist.conversion.hf.source:read",
        imports_dense=True,
    ),
)
# become checkpoints for init_from
IMPORTERS = tuple(entry for entry in FORMATS if entry.name not in (CHECKPOINT, UNIVERSAL))


def format_of(path: Path) -> ImportFormat:
    """By the names of the files in it; raises ConfigError if it is of none."""
    if not path.exists():
        raise ConfigError([f"{path}: no such file or folder"])
    for entry in FORMATS:
        if entry.recognizes(path):
            return entry
    raise ConfigError([f"{path}: must be {'; or '.join(entry.says for entry in FORMATS)}"])


def is_checkpoint(*paths: Path) -> bool:
    """Whether all of them are checkpoints or runs of this package."""
    return all(format_of(path).name == CHECKPOINT for path in paths)


def weights_of(path: Path, overrides: Sequence[str] = ()) -> Weights:
    """The model in ``path``, of any format; ``overrides`` set what the file itself does not.

    Raises ConfigError.
    """
    return format_of(path).read(path, overrides)
