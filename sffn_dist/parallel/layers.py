"""The norm and the core attention that the layer specs use: both run on any device and under sequence
parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sffn_dist.parallel import cpu_compat

try:  # apex is built from source for CUDA; what PyPI calls apex is another project
    from apex.normalization import FusedLayerNorm, FusedRMSNorm  # type: ignore[import-not-found]

    HAVE_APEX = True
except ImportError:
    HAVE_APEX = False


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension; its weights are marked ``sequence_parallel``.

    LayerNorm: (x - mean) / sqrt(var + eps) * weight + bias. RMSNorm: x / sqrt(mean(x^2) + eps) * weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.shape, self.eps = (hidden_size,), eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = (
            None
            if self.rms
            else nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class NormLayer:
    """apex's fused norm where apex imports, else torch's.

    A class, since Megatron's specs call classes and keep functions.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> nn.Module:
        if not HAVE_APEX or not cpu_compat.has_cuda():
            return Norm(config, hidden_size, eps, **kwargs)
        fused = FusedRMSNorm if config.normalization == "RMSNorm" else FusedLayerNorm
        norm: nn.Module = fused(hidden_size, eps=eps).to(torch.cuda.current_device(), config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal, by torch's scaled_dot_product_attention (flash on CUDA): no
    score matrix is kept.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__()
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"attn_mask_type = {attn_mask_type}: this core attention is causal")
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """query (S, batch, heads, d), key and value (S, batch, kv_heads, d) -> (S, batch, heads*d)."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (batch, heads, S, d)
        group = q.shape[1] // k.shape[1]
        grouped = group > 1 and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        # only flash attention knows grouped heads; without it the scores would be kept
        if group > 1 and not grouped:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
