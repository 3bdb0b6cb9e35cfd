"""Do two checkpoints hold the same? Tensor by tensor, bit for bit.

Or, of any two formats, by their logits on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffn_dist.checkpoint.manifest import Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.weights import Weights
from sffn_dist.conversion.formats import HUGGING_FACE, format_of, weights_of
from sffn_dist.conversion.hf import config_json, names
from sffn_dist.conversion.hf.tensors import Tensors
from sffn_dist.spec.config import ConfigError


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both.

    ``largest`` is of |a - b|, infinite where one is missing or of another shape.
    """

    tensor: str
    largest: float


def differences(a: Manifest, b: Manifest) -> Iterator[Difference]:
    """Every tensor whose bits differ, one in memory at a time; the layouts may be any."""
    left, right = Reader(a), Reader(b)
    names = dict.fromkeys((*left.specs, *right.specs))
    for name in names:
        for kind in dict.fromkeys((*a.kinds, *b.kinds)):
            present = [name in reader.specs and kind in reader.manifest.kinds for reader in (left, right)]
            if not all(present) or left.specs[name].shape != right.specs[name].shape:
                yield Difference(f"{kind} of {name}", float("inf"))
                continue
            left_tensor, right_tensor = left.full(name, kind), right.full(name, kind)
            if not torch.equal(left_tensor.view(torch.int32), right_tensor.view(torch.int32)):
                yield Difference(f"{kind} of {name}", float((left_tensor - right_tensor).abs().max()))


def positions_differ(a: Manifest, b: Manifest) -> list[str]:
    """Of what states where a run is, what differs."""
    keys = ("step", "optimizer_steps", "guide_optimizer_steps", "data_fingerprint")
    return [
        f"{key}: {getattr(a, key)} and {getattr(b, key)}"
        for key in keys
        if getattr(a, key) != getattr(b, key)
    ]


@dataclass(frozen=True)
class LogitsDifference:
    """Over tokens (n, s): the largest |a - b|, the relative RMS |a - b| / |a|, and how often both have the
    same likeliest token.
    """

    largest: float
    relative_rms: float
    same_choice: float


def compare_logits(a: Path, b: Path, *, rows: int = 2, length: int = 64, seed: int = 0) -> LogitsDifference:
    """Both models in fp32 on the same random tokens, one model in memory at a time.

    Raises ConfigError where the vocabularies differ.
    """
    sizes = [
        (weights.config.vocab_unpadded, weights.config.model.sequence) for weights in map(weights_of, (a, b))
    ]
    if sizes[0][0] != sizes[1][0]:
        raise ConfigError([f"{b}: a vocabulary of {sizes[1][0]}, {a} has {sizes[0][0]}: nothing to compare"])
    shape = (rows, min(length, sizes[0][1], sizes[1][1]))
    tokens = torch.randint(0, sizes[0][0], shape, generator=torch.Generator().manual_seed(seed))
    # logits of rows that pad the vocabulary are masked here, and of no meaning elsewhere
    first, second = (logits_of(path, tokens)[..., : sizes[0][0]].double() for path in (a, b))
    rms = (first - second).square().mean().sqrt() / first.square().mean().sqrt()
    same = (first.argmax(-1) == second.argmax(-1)).double().mean()
    return LogitsDifference(float((first - second).abs().max()), float(rms), float(same))


@torch.no_grad()
def logits_of(path: Path, tokens: Tensor) -> Tensor:
    """(n, s, vocab) on the CPU: of a Hugging Face folder by transformers' own model, of every other format
    by ours.
    """
    from sffn_dist import model as models

    if format_of(path).name == HUGGING_FACE:
        return transformers_model(path)(tokens).logits
    model = build(weights_of(path)).eval()
    device = next(model.parameters()).device
    return models.token_logits(model, tokens.to(device)).cpu()


def transformers_model(folder: Path) -> Any:
    """The folder's model in fp32.

    No code of the folder is run: a structured export's classes are those of this package.
    """
    from transformers import AutoModelForCausalLM

    from sffn_dist.conversion.hf.modeling_sffn import SffnForCausalLM

    structured = config_json.read(folder).family is names.SFFN
    if structured and names.bare_factors(Tensors(folder).shapes):
        return _renamed(folder, SffnForCausalLM)
    loader: Any = SffnForCausalLM if structured else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def _renamed(folder: Path, model_class: Any) -> Any:
    """A structured export of an earlier version, its tensors by the names that the class has today."""
    weights = weights_of(folder)
    model = model_class(model_class.config_class.from_pretrained(folder, local_files_only=True)).float()
    parameters = dict(model.named_parameters())
    for name in weights.names():
        for their_name, part in names.split(names.SFFN, name, weights.full(name), weights.config):
            parameters[their_name].copy_(part)
    return model.eval()


@torch.no_grad()
def build(weights: Weights) -> Any:
    """Our GPTModel in fp32 on one rank, with guides mixed in with the weights' alpha."""
    from sffn_dist import model as models
    from sffn_dist.parallel import topology

    config = weights.config.model_copy(
        update={"parallel": weights.config.parallel.model_copy(update={"tensor": 1})}
    )
    single_rank = topology.init_parallel(config)
    model = models.build(config, "fp32", single_rank, guide=weights.guide)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.full(name))
    models.mix_guide(model, weights.alpha)
    return model
