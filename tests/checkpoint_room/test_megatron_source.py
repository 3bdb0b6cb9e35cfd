"""Checkpoints that megatron-core wrote: the imported model has the logits of the one that was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CASES, LOGITS = Path(__file__).with_name("megatron_cases.py"), Path(__file__).with_name("logits_cases.py")
TOKENS = np.random.default_rng(1).integers(0, 48, (2, 12))
MODELS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "fused gelu": {"bias_gelu_fusion": True},
    "swiglu": {
        "swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False, "group_query_attention": True, "num_query_groups": 2,
        "kv_channels": 10, "untie_embeddings_and_output_weights": True, "rotary_base": 700, "norm_epsilon": 1e-3,
    },
    "swiglu with biases": {"swiglu": True},
    "qkv bias": {"add_bias_linear": False, "add_qkv_bias": True, "swiglu": True},
}  # fmt: skip
WAYS = ("stacked", "by_layer", "halves", "legacy", "pipeline", "interleaved")
Write = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture
def write(ranks: Any, tmp_path: Path) -> Write:
    """A checkpoint of a model, and the model's logits."""

    def saved(how: str, model: str = "gelu", tensor: int = 1, **extra: Any) -> tuple[Path, np.ndarray]:
        options = {**MODELS[model], **extra}
        found = ranks(tensor, tensor).run(
            CASES, "save", how=how, folder=str(tmp_path / "c"), tensor=tensor, tokens=TOKENS, **options
        )
        return tmp_path / "c", found[0]

    return saved


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_the_source_s(ranks: Any, write: Write, how: str, tensor: int, model: str) -> None:
    if how == "halves" and not MODELS[model].get("swiglu"):
        pytest.skip("nothing gated")
    path, expected = write(how, model, tensor)
    (got,) = ranks(1).run(LOGITS, "logits", importer="megatron", path=str(path), tokens=TOKENS)
    assert expected.std() > 0.3
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
