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

Matrices are ``nn.Linear``, which adapters, quantisation and tensor-parallel plans look for. Of ``low_rank``
and ``dense`` layers the matrices at the inner features are cut over tensor-parallel ranks
(``base_model_tp_plan``); the feed-forward layers of block structures are whole on every rank.
"""

import math

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

OLDEST = (4, 48)  # before, an attention made outside of LlamaModel is not causal under sdpa
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"transformers = {transformers.__version__}: modeling_sffn.py needs 4.48 or newer, before which its "
        "attention would not be causal"
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
        # what is not named here is whole on every rank: factors away from the inner features, and blocks
        "layers.*.mlp.linear_fc1.up.gate_proj": "colwise",
        "layers.*.mlp.linear_fc1.up.up_proj": "colwise",
        "layers.*.mlp.linear_fc1.dense.gate_proj": "colwise",
        "layers.*.mlp.linear_fc1.dense.up_proj": "colwise",
        "layers.*.mlp.linear_fc1.guide.gate_proj": "colwise",
        "layers.*.mlp.linear_fc1.guide.up_proj": "colwise",
        "layers.*.mlp.linear_fc2.down.down_proj": "rowwise",
        "layers.*.mlp.linear_fc2.dense.down_proj": "rowwise",
        "layers.*.mlp.linear_fc2.guide.down_proj": "rowwise",
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


class InnerLinear(nn.Module):
    """A matrix at the inner features: ``down_proj`` from them, or ``up_proj`` to them, with ``gate_proj``
    apart where they are gated, so that each is cut by itself.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, *, first: bool, gated: bool):
        super().__init__()
        parts = ("gate_proj", "up_proj") if gated else ("up_proj",)
        self.parts = parts if first else ("down_proj",)
        for name in self.parts:
            setattr(self, name, nn.Linear(inputs, outputs // len(self.parts), bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        y = [getattr(self, name)(x) for name in self.parts]
        return torch.cat(y, dim=-1) if len(y) > 1 else y[0]


class BlockLinear(nn.Module):
    """A block-diagonal matrix: x (..., K, I) -> (..., K, O). The bias (K O,) is added by who lays y out."""

    def __init__(self, blocks: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(blocks * outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return block_diagonal(x, self.weight)


class SffnLinear(nn.Module):
    """A linear (inputs -> outputs) kept as the factors of its structure, with a guide or without.

    ``first``: the feed-forward's first linear, from the residual stream to the inner features. The bias is
    the last factor's.
    """

    def __init__(self, config: SffnConfig, kind: str, inputs: int, outputs: int, *, first: bool):
        super().__init__()
        self.kind, bias = kind, config.mlp_bias
        self.alpha = config.guide_alpha if kind != "dense" else None
        rank, blocks, narrow = config.ffn_rank or 0, config.ffn_blocks or 1, min(inputs, outputs)
        cut = {"first": first, "gated": first and config.gated}
        if kind == "dense":
            self.dense, terms = InnerLinear(inputs, outputs, bias, **cut), 0
        elif kind == "low_rank":
            self.down = nn.Linear(inputs, rank, False) if first else InnerLinear(inputs, rank, False, **cut)
            self.up = InnerLinear(rank, outputs, bias, **cut) if first else nn.Linear(rank, outputs, bias)
            terms = rank
        elif kind == "block_dense":
            self.block_in = BlockLinear(blocks, inputs // blocks, rank // blocks, False)
            self.up, terms = nn.Linear(rank, outputs, bias), rank // blocks
        elif kind == "block_shuffle":
            self.block_in = BlockLinear(blocks, inputs // blocks, narrow // blocks, False)
            self.block_out = BlockLinear(blocks, narrow // blocks, outputs // blocks, bias)
            terms = max(1, narrow // blocks // blocks)
        else:
            raise ValueError(f"ffn_kind = {kind!r}: must be dense, low_rank, block_dense or block_shuffle")
        # factors such that the product's entries are of initializer_range; for what no file has set
        self._set_std(math.sqrt(config.initializer_range / math.sqrt(terms)) if terms else None)
        if self.alpha is not None:
            whole = kind != "low_rank"
            self.guide = (
                nn.Linear(inputs, outputs, False) if whole else InnerLinear(inputs, outputs, False, **cut)
            )

    def _set_std(self, std: float | None) -> None:
        for module in self.modules():
            if std is not None and isinstance(module, nn.Linear | BlockLinear):
                setattr(module, "factor_std", std)  # noqa: B010  of ours alone: nn.Linear declares none

    def structured(self, x: Tensor, scale: float) -> Tensor:
        """``scale`` times the factors' map, and the bias."""
        if self.kind == "dense":
            return self.dense(x)
        if self.kind == "low_rank":
            z = self.down(x)
            return self.up(z if scale == 1.0 else scale * z)
        blocks = self.block_in.weight.shape[0]
        z = self.block_in(x.unflatten(-1, (blocks, -1))).flatten(-2)
        z = z if scale == 1.0 else scale * z
        if self.kind == "block_dense":
            return self.up(z)
        # feature r*B + l of z feeds block l; row s of block l is feature s*B + l of y
        y = self.block_out(z.unflatten(-1, (-1, blocks)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)
        return y if self.block_out.bias is None else y + self.block_out.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.alpha is None:
            return self.structured(x, 1.0)
        return self.alpha * self.guide(x) + self.structured(x, 1.0 - self.alpha)


class SffnMLP(nn.Module):
    """linear_fc2(act(linear_fc1 x)); gated: act(gate) * up with linear_fc1 = [gate; up]."""

    def __init__(self, config: SffnConfig, kind: str):
        super().__init__()
        inner = config.intermediate_size
        self.gated, self.act_fn = config.gated, ACT2FN[config.hidden_act]
        outputs = 2 * inner if config.gated else inner
        self.linear_fc1 = SffnLinear(config, kind, config.hidden_size, outputs, first=True)
        self.linear_fc2 = SffnLinear(config, kind, inner, config.hidden_size, first=False)

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
    """First weights of a module that no file has set.

    Loaded tensors bear a mark; recent versions of transformers skip them in torch.nn.init's functions, this
    does in all.
    """
    std = getattr(module, "factor_std", None)
    if std is None:
        super(LlamaModel if isinstance(model, LlamaModel) else LlamaForCausalLM, model)._init_weights(module)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if getattr(parameter, "_is_hf_initialized", False):
            continue
        if name == "bias":
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=std)


SffnConfig.register_for_auto_class()
SffnModel.register_for_auto_class("AutoModel")
SffnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
