"""The config's section ``model``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sffn_dist.spec.config_types import PositiveFloat, PositiveInt, Section


class Model(Section):
    """The transformer around the feed-forward layers (paper, appendix: models)."""

    layers: Annotated[int, Field(gt=0, le=10_000)] = Field(description="transformer layers")
    width: PositiveInt = Field(description="of the residual stream, h")
    heads: PositiveInt = Field(description="query heads")
    kv_heads: PositiveInt | None = Field(None, description="key/value heads (GQA); default: heads")
    attention_dim: PositiveInt | None = Field(None, description="heads x head size; default: width")
    sequence: PositiveInt = Field(1024, description="tokens of context")
    vocab: PositiveInt = Field(
        32_000, description="rows of the embedding, whatever the tokenizer uses of them"
    )
    vocab_unpadded: PositiveInt | None = Field(
        None, description="rows that stand for tokens, the first ones; others are padding; default: vocab"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        "layernorm", description="before attention, before the FFN, at the end"
    )
    norm_epsilon: PositiveFloat = Field(1e-5, description="added to the variance in norms")
    activation: Literal["gelu", "gelu_erf", "swiglu"] = Field(
        "gelu", description="of the FFN; gelu: its tanh form, as the paper's; gelu_erf: exact; swiglu: gated"
    )
    bias: bool = Field(True, description="whether linears have biases")
    tie_embeddings: bool = Field(True, description="the output layer uses the embedding's matrix")
    rope_base: PositiveInt = Field(10_000, description="base of the rotary embeddings' frequencies")
    init_std: PositiveFloat = Field(0.02, description="standard deviation of the first weights")
