"""A model's weights by name, wherever they lie: what importers give and exporters take.

Tensors bear the names and full shapes of :func:`sffn_dist.spec.split_table.model_tensors` and come one at a
time, in fp32, so that nothing here holds
a model in memory: a conversion needs about twice the largest tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.counts import all_dense
from sffn_dist.spec.split_table import ffn_structure, is_guide, model_tensors
from sffn_dist.structured.functional import from_dense, to_dense


@dataclass(frozen=True)
class Weights:
    """A GPT in this project's terms.

    ``full(name)`` reads a tensor anew at each call. With ``guide`` every structured linear has one, and the
    model is the mix of ``alpha`` W x + (1 - alpha) U(V x).
    """

    config: Config
    full: Callable[[str], Tensor]
    origin: str  # what it was read from, for people
    guide: bool = False
    alpha: float = 0.0
    step: int = 0  # steps of training behind it
    tokenizer: str | None = None  # the text of its tokenizer.json
    # tokenizer_config.json and generation_config.json, by name, as data/tokenizer_files.py carries them
    tokenizer_settings: Mapping[str, str] = field(default_factory=dict)
    trained: bool = False  # on a corpus of ours: ``config.data`` says what was put around documents
    # for model cards: data fingerprint, revision, results, ...
    facts: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()  # what was decided or left out in reading, for people

    def tokenizer_texts(self) -> dict[str, str]:
        """The tokenizer's files by name: tokenizer.json and its settings; none of a model without one."""
        tokens = {} if self.tokenizer is None else {"tokenizer.json": self.tokenizer}
        return {**self.tokenizer_settings, **tokens}

    def names(self) -> list[str]:
        """Every tensor's name, in the model's order."""
        return list(model_tensors(self.config, guide=self.guide))


def finite(tensor: Tensor, name: str, origin: str) -> Tensor:
    """The tensor as it is; raises ConfigError naming it where a value is NaN or infinite.

    A sum tells in one pass without a copy; only where it is not finite, which finite values can make it too,
    are the values looked at.
    """
    if not math.isfinite(float(tensor.sum())):
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise ConfigError(
                [f"{origin}: {name} = NaN or inf in {wrong} of {tensor.numel()}: must be finite"]
            )
    return tensor


def untie(config: Config) -> Config:
    """The config with an output layer of its own."""
    return config.model_copy(update={"model": config.model.model_copy(update={"tie_embeddings": False})})


TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")  # a row for each token


def padded(weights: Weights, multiple: int) -> Weights:
    """The same model with rows of zeros after its vocabulary, up to a multiple of ``multiple``.

    ``model.vocab_unpadded`` says how many rows stand for tokens.
    """
    vocab = weights.config.model.vocab
    return _with_rows(weights, vocab + -vocab % multiple)


def trimmed(weights: Weights) -> Weights:
    """The same model without the rows that only pad its vocabulary."""
    return _with_rows(weights, weights.config.vocab_unpadded)


def _with_rows(weights: Weights, rows: int) -> Weights:
    """``rows`` rows of the embedding, and of the output layer: the first ones, then zeros."""
    vocab, unpadded = weights.config.model.vocab, weights.config.vocab_unpadded
    if rows == vocab:
        return weights
    settings = {"vocab": rows, "vocab_unpadded": None if rows == unpadded else unpadded}
    model = weights.config.model.model_copy(update=settings)

    def full(name: str) -> Tensor:
        tensor = weights.full(name)
        if name not in TABLES:
            return tensor
        kept = tensor[:rows]
        return torch.cat([kept, kept.new_zeros(rows - len(kept), *kept.shape[1:])])

    config = weights.config.model_copy(update={"model": model})
    return dataclasses.replace(weights, config=config, full=full)


def merged(weights: Weights) -> Weights:
    """The same map with dense feed-forward layers: W = U V multiplied out, guides folded in with their
    alpha.
    """
    # in order: to_dense reads the sizes from the factor applied first
    sources = dict.fromkeys(weights.names())

    def full(name: str) -> Tensor:
        if name in sources:
            return weights.full(name)
        prefix = name.removesuffix("weight")
        leaves = [other.removeprefix(prefix) for other in sources if other.startswith(prefix)]
        factors = {leaf: weights.full(prefix + leaf) for leaf in leaves if leaf not in ("guide", "bias")}
        dense = to_dense(ffn_structure(weights.config, _layer(name)), factors)
        if "guide" in leaves:
            dense.mul_(1.0 - weights.alpha).add_(weights.full(f"{prefix}guide"), alpha=weights.alpha)
        return dense

    return dataclasses.replace(weights, config=all_dense(weights.config), full=full, guide=False, alpha=0.0)


def approximated(weights: Weights, ffn: Mapping[str, Any], *, guide: bool = False) -> Weights:
    """A dense model with its feed-forward matrices replaced by the nearest structured ones in Frobenius norm.

    ``ffn`` are settings of the config's section of that name: kind, rank, blocks, dense_layers. With
    ``guide`` the dense matrices stay as guides, so that self-guided training starts from the model as it is
    (alpha = 1). Raises ConfigError where the sizes do not fit.
    """
    tree = weights.config.model_dump(mode="json")
    tree["ffn"] = {**tree["ffn"], "width": weights.config.ffn_width, **ffn}
    if guide:
        tree["guide"] = {"mode": "fixed_step", "fraction": 1.0}
    config = loading.from_tree(tree)
    dense = set(weights.names())
    last: dict[str, dict[str, Tensor]] = {}  # the factors of one linear come from one decomposition

    def full(name: str) -> Tensor:
        if name in dense:
            return weights.full(name)
        prefix, _, leaf = name.rpartition(".")
        if is_guide(name):
            return weights.full(f"{prefix}.weight")
        if prefix not in last:
            last.clear()
            dense_matrix = weights.full(f"{prefix}.weight")
            if not torch.isfinite(dense_matrix).all():
                raise ConfigError(
                    [
                        f"{weights.origin}: {prefix}.weight holds values that are not finite: "
                        f"nothing is near it"
                    ]
                )
            last[prefix] = from_dense(ffn_structure(config, _layer(name)), dense_matrix)
        return last[prefix][leaf]

    return dataclasses.replace(weights, config=config, full=full, guide=guide, alpha=1.0 if guide else 0.0)


def _layer(name: str) -> int:
    return int(name.split(".")[2])
