"""``read``: a Hugging Face folder -> weights in this project's terms.

Runs no code of the folder, needs no transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sffn_dist.checkpoint.weights import Weights, untie
from sffn_dist.conversion import downloads
from sffn_dist.conversion.hf import config_json, names
from sffn_dist.conversion.hf.config_json import Description, shown
from sffn_dist.conversion.hf.tensors import Tensors
from sffn_dist.data import tokenizer_conversion, tokenizer_files
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import model_tensors
from sffn_dist.structured.cut import TensorSpec

TABLE, OUTPUTS = "embedding.word_embeddings.weight", ("lm_head.weight", "embed_out.weight")
SHOWN = 20  # problems reported of a folder
log = logging.getLogger(__name__)


def read(folder: Path, overrides: Sequence[str] = ()) -> Weights:
    """The model in ``folder``: of type llama, mistral, qwen2, starcoder2, gpt_neox, or an export of ours
    (sffn).

    Settings, names and shapes are checked here, from headers; tensors are read when asked for, and cast to
    fp32. A bias that the model has nowhere but in some linears is zero in the others.

    Raises:
        ConfigError: with every setting that this project's model cannot represent, or every tensor that is
            missing, has another shape, or
            would be lost; or naming the file that is broken.
    """
    description = config_json.read(folder)
    tensors = Tensors(folder)
    source = _Source(description, tensors)
    problems = list(source.problems())
    if problems:
        more = [f"and {len(problems) - SHOWN} more of this kind"] if len(problems) > SHOWN else []
        raise ConfigError([f"{folder}: {source.hint(problem)}" for problem in problems[:SHOWN]] + more)
    notices = source.unused()
    if head := source.untied():
        notices.insert(
            0,
            f"{head} differs from the embedding, though {config_json.NAME} has tie_word_embeddings = true: "
            f"kept, as model.tie_embeddings = false",
        )
        description = dataclasses.replace(description, config=untie(description.config))
        source = _Source(description, tensors)
    tree = config_json.read_object(folder / config_json.NAME)
    kept = ("architectures", "dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id")
    facts = {key: tree[key] for key in kept if tree.get(key) is not None}
    tokenizer, settings = _tokenizer(folder, description.config.model.vocab)
    return Weights(
        config=description.config,
        full=source.full,
        origin=f"{folder} ({description.model_type})",
        guide=description.guide_alpha is not None,
        alpha=description.guide_alpha or 0.0,
        step=description.step,
        tokenizer=tokenizer,
        tokenizer_settings=settings,
        facts={"model_type": description.model_type, **facts},
        notices=tuple(notices),
    )


class _Source:
    """Tensors of a folder by our names."""

    def __init__(self, description: Description, tensors: Tensors):
        self.description, self.tensors, self.config = description, tensors, description.config
        self.specs = model_tensors(self.config, guide=description.guide_alpha is not None)
        self.family = description.family
        if self.family.factor_modules and names.bare_factors(tensors.shapes):
            self.family = names.SFFN_BARE

    def full(self, name: str) -> Tensor:
        """A tensor of ours, fp32."""
        if self._absent(name):
            return torch.zeros(self.specs[name].shape)
        theirs = names.theirs(self.family, name, self.config)
        return names.join([self.tensors.get(self._alias(their_name)) for their_name in theirs], self.config)

    def _absent(self, name: str) -> bool:
        """A bias that the linear has not there."""
        module, _, leaf = name.rpartition(".")
        return (
            leaf == "bias"
            and ".layers." in module
            and module.split(".", 3)[3] in self.description.without_bias
        )

    def _alias(self, name: str) -> str:
        """transformers calls GPT-NeoX's output layer lm_head in some versions and embed_out in files."""
        return "lm_head.weight" if name == "embed_out.weight" and name not in self.tensors.shapes else name

    def problems(self) -> Iterator[str]:
        """A sentence for each tensor that is missing, of another shape, or of no meaning here."""
        used = set()
        for name, spec in self.specs.items():
            if self._absent(name):
                continue
            for their_name, expected in self._expected(name, spec).items():
                shape = self.tensors.shapes.get(their_name)
                used.add(their_name)
                if shape is None:
                    yield f"tensor {their_name} is missing"
                elif their_name in self.tensors.other_types:
                    yield (
                        f"tensor {their_name} is of {self.tensors.other_types[their_name]}, "
                        f"must be floating-point numbers"
                    )
                elif shape != expected:
                    yield f"tensor {their_name} is {list(shape)}, {config_json.NAME} means {list(expected)}"
        tied, table = self._tied(), self.specs[TABLE].shape
        for their_name in tied:
            shape = self.tensors.shapes[their_name]
            if their_name in self.tensors.other_types or shape != table:
                kind = self.tensors.other_types.get(their_name, list(shape))
                yield f"tensor {their_name} is {kind}, must be as the embedding, {list(table)}"
        for their_name in self.tensors.shapes:
            if (
                their_name not in used
                and their_name not in tied
                and not their_name.endswith(self.family.unread or ("\0",))
            ):
                yield (
                    f"tensor {shown(their_name)} has no place in the model that {config_json.NAME} describes"
                )

    def _tied(self) -> list[str]:
        """Output layers that are there beside an embedding that shall be used for them."""
        heads = OUTPUTS if self.config.model.tie_embeddings else ()
        return [name for name in heads if name in self.tensors.shapes]

    def untied(self) -> str | None:
        """Name of an output layer that is not the embedding, where config.json says that it is."""
        table = self.full(TABLE) if self._tied() else None
        return next(
            (
                name
                for name in self._tied()
                if table is None or not torch.equal(self.tensors.get(name), table)
            ),
            None,
        )

    def unused(self) -> list[str]:
        """Sentences on the folder's tensors that are left out, though they hurt nothing."""
        endings = self.family.unread or ("\0",)
        computed = [name for name in self.tensors.shapes if name.endswith(endings)]
        notices = [f"not read: {_listed(computed)}: computed from the settings here"] if computed else []
        if self.tensors.unnamed:
            notices.append(f"not read: {_listed(self.tensors.unnamed)}: the index does not name it")
        return notices

    def hint(self, problem: str) -> str:
        """The problem, and of a missing tensor the name there that is most like it.

        Slow, so for problems that are shown.
        """
        near = (
            difflib.get_close_matches(problem.split()[1], self.tensors.shapes, n=1)
            if problem.endswith("is missing")
            else []
        )
        return problem + (f"; the nearest there is {near[0]}" if near else "")

    def _expected(self, name: str, spec: TensorSpec) -> dict[str, tuple[int, ...]]:
        shapes = names.shapes(self.family, name, spec.shape, self.config)
        return {self._alias(their_name): shape for their_name, shape in shapes.items()}


def _listed(names_there: list[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names_there) - 1} more" if len(names_there) > 1 else ""
    return f"{shown(names_there[0])}{more}"


def _tokenizer(folder: Path, rows: int) -> tuple[str | None, dict[str, str]]:
    """The text of the folder's tokenizer as a tokenizer.json, and what it says besides.

    None and a warning where there is none that can be read: training asks for data.tokenizer then. Raises
    ConfigError where it is broken, or has more tokens than the ``rows`` of the embedding.
    """
    files, settings = tokenizer_files.find(folder), tokenizer_files.settings(folder).texts()
    if files is None:
        log.warning("%s: holds no tokenizer; training from it needs data.tokenizer", folder)
        return None, {}
    for path in files.tokens:
        downloads.check(path)
    try:
        text = tokenizer_conversion.read_text(files)
    except tokenizer_conversion.MissingPackage as error:
        log.warning("%s; training from the model needs data.tokenizer", error)
        return None, {}
    needed = max(tokenizer_files.vocabulary(text).values(), default=-1) + 1
    if needed > rows:
        raise ConfigError(
            [
                f"{files.tokens[0]}: has tokens up to id {needed - 1}, must have at most as many as "
                f"{config_json.NAME}'s vocab_size = {rows}, the rows of the embedding"
            ]
        )
    return text, settings
