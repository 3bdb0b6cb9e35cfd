"""A checkpoint as one in DeepSpeed's universal format, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sffn_dist.atomic_io import write_text
from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.manifest import KINDS, TOKENIZER, TOKENIZER_SETTINGS, Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.writer import check_room
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.split_table import is_guide


def to_universal(source: Manifest, target: Path, *, tensor: int = 1) -> Path:
    """A checkpoint in DeepSpeed's universal format, moments and step counts with it, for ``tensor``
    tensor-parallel ranks.

    Raises ConfigError where the checkpoint has no moments, or the ranks cut a tensor in a way that the format
    cannot tell.
    """
    from sffn_dist.conversion import deepspeed

    if source.kinds != KINDS:
        raise ConfigError(
            [
                f"{source.folder}: holds {', '.join(source.kinds)} alone, a universal checkpoint needs "
                f"{', '.join(KINDS)}"
            ]
        )
    reader, guides = Reader(source), source.guide_optimizer_steps or 0
    steps = {name: guides if is_guide(name) else source.optimizer_steps for name in reader.specs}
    with reshard.fresh(target) as folder:
        check_room(folder, source.bytes)
        weights = reader.weights()
        place = deepspeed.write(weights, reader.full, steps, folder, tensor=tensor)
        for name, text in weights.tokenizer_texts().items():
            write_text(place / name, text)
    return target / place.name


def from_universal(source: Path, target: Path, config: Config | None = None) -> Manifest:
    """A checkpoint of a universal one, to resume from; ``config`` where it was not written here.

    Raises ConfigError.
    """
    from sffn_dist.conversion import deepspeed

    universal = deepspeed.read(source, config)
    base_steps = {count for name, count in universal.steps.items() if not is_guide(name)}
    guide_steps = {count for name, count in universal.steps.items() if is_guide(name)}
    if len(base_steps) != 1 or len(guide_steps) > 1:
        raise ConfigError(
            [
                f"{source}: its parameters have taken different numbers of steps: "
                f"{sorted(base_steps | guide_steps)}"
            ]
        )
    header = dataclasses.replace(
        reshard.header(universal.weights, target),
        kinds=KINDS,
        optimizer_steps=base_steps.pop(),
        guide_optimizer_steps=guide_steps.pop() if guide_steps else None,
    )
    latest = source / deepspeed.LATEST
    place = source / latest.read_text(encoding="utf-8").strip() if latest.is_file() else source
    names = (TOKENIZER, *TOKENIZER_SETTINGS)
    texts = {name: (place / name).read_text(encoding="utf-8") for name in names if (place / name).is_file()}
    return reshard.write(header, universal.full, target, texts=texts)
