"""GPT with structured feed-forward layers (arXiv 2406.16450) for transformers: Llama's attention, cache and
generation around them.

Self-contained: a copy of this file travels with exported models, which load by
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. A feed-forward linear is kept as its
factors and applied as such:

    low_rank       y = up (down x)                      down (R, N), up (M, R)
    block_dense    y = up (block_in x)                  block_in (B, R/B, N/B), up (M, R)
    block_shuffle  y = unshuffle(block_out shuffle(block_in x))    block_in (B, n/B, N/B),
                                                                   block_out (B, M/B, n/B),
                                                                   n = min(N, M)
    guided         y = alpha W x + (1 - alpha) (one of these)      guide W (M, N)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class SffnConfig(LlamaConfig):
    """Llama's configuration, and of the feed-forward layers: their structure, their activation, which are
    dense; the norm.
    """

    model_type = "sffn"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    norm: str = "rmsnorm"  # or layernorm; rms_norm_eps is either's
    gated: bool = True  # hidden_act(gate) * up, from one linear of 2 x intermediate_size features
    ffn_kind: str = "dense"  # low_rank, block_dense, block_shuffle
    ffn_rank: int | None = None  # R
    ffn_blocks: int | None = None  # B
    dense_layers: list[int] | tuple[int, ...] = ()  # layers whose feed-forward stays dense
    guide_alpha: float | None = None  # weight of the guides; None: there are none

    def validate_architecture(self) -> None:
        """head_dim is set by itself, so hidden_size need not be a multiple of the heads."""


def block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """y[..., k, o] = sum_i weight[k, o, i] x[..., k, i]: x (..., K, I), weight (K, O, I)."""
    blocks, outputs, inputs = weight.shape
    tokens = x.reshape(-1, blocks, inputs).transpose(0, 1)
    return torch.bmm(tokens, weight.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-2], blocks, outputs)


class SffnLinear(nn.Module):
    """A linear (inputs -> outputs) kept as the factors of its structure, with a guide or without."""

    weight: Tensor
    down: Tensor
    up: Tensor
    block_in: Tensor
    block_out: Tensor

    def __init__(self, config: SffnConfig, kind: str, inputs: int, outputs: int):
        super().__init__()
        self.kind, self.std = kind, config.initializer_range
        self.alpha = config.guide_alpha if kind != "dense" else None
        for name, shape in self.factor_shapes(config, kind, inputs, outputs).items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        if self.alpha is not None:
            self.guide = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if config.mlp_bias else None

    @staticmethod
    def factor_shapes(config: SffnConfig, kind: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """name -> shape, first-applied first."""
        rank, blocks, narrow = config.ffn_rank or 0, config.ffn_blocks or 1, min(inputs, outputs)
        block_in = (blocks, (rank if kind == "block_dense" else narrow) // blocks, inputs // blocks)
        if kind == "dense":
            return {"weight": (outputs, inputs)}
        if kind == "low_rank":
            return {"down": (rank, inputs), "up": (outputs, rank)}
        if kind == "block_dense":
            return {"block_in": block_in, "up": (outputs, rank)}
        if kind == "block_shuffle":
            return {"block_in": block_in, "block_out": (blocks, outputs // blocks, narrow // blocks)}
        raise ValueError(f"ffn_kind = {kind!r}: must be dense, low_rank, block_dense or block_shuffle")

    def structured(self, x: Tensor) -> Tensor:
        """The factors' map, without guide and bias."""
        if self.kind == "dense":
            return F.linear(x, self.weight)
        if self.kind == "low_rank":
            return F.linear(F.linear(x, self.down), self.up)
        blocks = self.block_in.shape[0]
        z = block_diagonal(x.unflatten(-1, (blocks, -1)), self.block_in).flatten(-2)
        if self.kind == "block_dense":
            return F.linear(z, self.up)
        # feature r*B + l of z feeds block l; row s of block l is feature s*B + l of y
        y = block_diagonal(z.unflatten(-1, (-1, blocks)).transpose(-1, -2), self.block_out)
        return y.transpose(-1, -2).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.structured(x)
        if self.alpha is not None:
            y = self.alpha * F.linear(x, self.guide) + (1.0 - self.alpha) * y
        return y if self.bias is None else y + self.bias

    def initialise(self) -> None:
        """Gaussian weights, of factors such that the product's entries are of initializer_range.

        For what no file has set.

        Loaded tensors bear a mark; recent versions of transformers skip them in torch.nn.init's functions,
        this does in all.
        """
        terms = {"low_rank": lambda: self.down.shape[0], "block_dense": lambda: self.block_in.shape[1]}
        terms["block_shuffle"] = lambda: max(1, self.block_in.shape[1] // self.block_in.shape[0])
        factor_std = math.sqrt(self.std / math.sqrt(terms[self.kind]())) if self.kind in terms else self.std
        for name, parameter in self.named_parameters():
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.std if name == "guide" else factor_std)


class SffnMLP(nn.Module):
    """linear_fc2(act(linear_fc1 x)); gated: act(gate) * up with linear_fc1 = [gate; up]."""

    def __init__(self, config: SffnConfig, kind: str):
        super().__init__()
        inner = config.intermediate_size
        self.gated, self.act_fn = config.gated, ACT2FN[config.hidden_act]
        self.linear_fc1 = SffnLinear(config, kind, config.hidden_size, 2 * inner if config.gated else inner)
        self.linear_fc2 = SffnLinear(config, kind, inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear_fc1(x)
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            return self.linear_fc2(self.act_fn(gate) * up)
        return self.linear_fc2(self.act_fn(y))


def norm_layer(config: SffnConfig) -> nn.Module:
    """LayerNorm with its bias, or RMSNorm."""
    layer = nn.LayerNorm if config.norm == "layernorm" else LlamaRMSNorm
    return layer(config.hidden_size, eps=config.rms_norm_eps)


class SffnDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with another feed-forward and norm; nothing dense is made on the way."""

    def __init__(self, config: SffnConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = SffnMLP(config, "dense" if layer_idx in config.dense_layers else config.ffn_kind)
        self.input_layernorm = norm_layer(config)
        self.post_attention_layernorm = norm_layer(config)


class SffnModel(LlamaModel):
    """Llama's model of such layers."""

    config_class = SffnConfig
    _no_split_modules = ["SffnDecoderLayer"]

    def __init__(self, config: SffnConfig):
        super(LlamaModel, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [SffnDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = norm_layer(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(self, module)


class SffnForCausalLM(LlamaForCausalLM):
    """Llama's causal language model on top: KV cache, generate and attention back ends are transformers'
    own.
    """

    config_class = SffnConfig
    _no_split_modules = ["SffnDecoderLayer"]

    def __init__(self, config: SffnConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = SffnModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(self, module)


def initialise(model: nn.Module, module: nn.Module) -> None:
    """First weights of a module that no file has set."""
    if isinstance(module, SffnLinear):
        module.initialise()
    else:
        super(LlamaModel if isinstance(model, LlamaModel) else LlamaForCausalLM, model)._init_weights(module)


SffnConfig.register_for_auto_class()
SffnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
