"""Rows that pad a vocabulary: no probability goes there, and they leave as they came."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sffn_dist.checkpoint.manifest import Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.reshard import write_weights
from sffn_dist.checkpoint.weights import TABLES, Weights, padded, trimmed
from sffn_dist.conversion.hf import source
from sffn_dist.conversion.hf.export import export
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError

transformers = pytest.importorskip("transformers")

CASES = Path(__file__).with_name("hf_cases.py")
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "kv_heads": 2, "bias": False}
VOCAB, PADDED = 37, 48


def trained_padding(weights: Weights) -> Weights:
    """The same with padding that has been trained into the likeliest tokens, were it asked."""

    def full(name: str) -> torch.Tensor:
        tensor = weights.full(name).clone()
        if name in TABLES:
            tensor[VOCAB:] = 30.0 * tensor[:1].sign()
        return tensor

    return replace(weights, full=full)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tree_of: Any, drawn: Any) -> tuple[Weights, Weights]:
    """A model, and it padded."""
    weights = drawn(tree_of("low_rank", **LLAMA, tie_embeddings=request.param))
    return weights, trained_padding(padded(weights, 16))


def test_a_padded_model_computes_what_it_did(
    pair: tuple[Weights, Weights], reference: Any, tokens: torch.Tensor
) -> None:
    weights, more = pair
    assert (more.config.model.vocab, more.config.vocab_unpadded) == (PADDED, VOCAB)
    assert padded(more, 16) is more
    fresh = padded(weights, 16).full("embedding.word_embeddings.weight")
    assert fresh.shape[0] == PADDED
    assert not fresh[VOCAB:].any()
    logits = reference(more, tokens)
    assert torch.allclose(logits[..., :VOCAB], reference(weights, tokens), atol=1e-5)
    assert (logits[..., VOCAB:] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_loss_of_a_padded_model_is_the_loss(
    pair: tuple[Weights, Weights], ranks: Any, tokens: torch.Tensor, tensor: int
) -> None:
    """Also over tensor-parallel ranks, where the odd vocabulary itself could not be cut."""

    def losses(weights: Weights, tensor: int) -> list[Any]:
        tree = weights.config.model_dump(mode="json")
        tensors = {name: weights.full(name).numpy() for name in weights.names()}
        tree["parallel"]["tensor"] = tensor
        found: list[Any] = ranks(tensor, tensor).run(
            CASES, "losses", tree=tree, tensors=tensors, tokens=tokens.numpy()
        )
        return found

    weights, more = pair
    (expected,) = losses(weights, 1)
    for found in losses(more, tensor):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("ffn", ["merged", "structured"])
def test_the_true_vocabulary_travels(
    ffn: Any, pair: tuple[Weights, Weights], tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Import, checkpoint, export and import again; an export never samples padding."""
    weights, more = pair
    write_weights(more, tmp_path / "checkpoint")
    held = Reader(Manifest.read(tmp_path / "checkpoint")).weights()
    assert held.config.vocab_unpadded == VOCAB
    start = json.loads((tmp_path / "checkpoint" / "start.json").read_text())
    assert loading.from_tree({**start, "train": {"steps": 1}}).vocab_unpadded == VOCAB
    folder = export(held, tmp_path / "m", ffn=ffn, dtype="fp32")
    assert source.read(folder).config.vocab_unpadded == VOCAB
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert (model(tokens).logits.argmax(-1) >= VOCAB).any(), "padding is the likeliest, were it asked"
    generated = model.generate(tokens[:, :4], max_new_tokens=6, do_sample=True)
    assert generated.shape[1] > 4
    assert (generated < VOCAB).all()
    card = (folder / "README.md").read_text()
    assert "Rows 37 to 47 of the vocabulary stand for no token." in card
    cut = export(trimmed(held), tmp_path / "cut", ffn=ffn, dtype="fp32")
    plain = export(weights, tmp_path / "plain", ffn=ffn, dtype="fp32")
    got, expected = (load_file(path / "model.safetensors") for path in (cut, plain))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert "stand for no token" not in (cut / "README.md").read_text()
    assert (cut / "config.json").read_text() == (plain / "config.json").read_text()
    assert (cut / "generation_config.json").read_text() == (plain / "generation_config.json").read_text()


def test_more_tokens_than_rows_are_refused(tree_of: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_unpadded = 38: must not exceed model\.vocab = 37"):
        loading.from_tree(tree_of(vocab_unpadded=38))
