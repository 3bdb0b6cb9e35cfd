"""Which of the kernels' activations Megatron's settings ask for."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from sffn_kernels.activation import Activation


def activation_of(config: TransformerConfig) -> Activation | None:
    """The activation that Megatron's settings ask for, by the name it has here; None for another one."""
    function: Any = config.activation_func
    approximate = "none"
    if (
        isinstance(function, functools.partial)
        and not function.args
        and set(function.keywords) == {"approximate"}
    ):
        function, approximate = function.func, function.keywords["approximate"]
    if config.use_te_activation_func or config.activation_func_fp8_input_store:
        return None
    if config.gated_linear_unit:
        plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
        return "swiglu" if function is F.silu and plain else None
    if function is not F.gelu:
        return None
    # fused with its bias, Megatron's is the tanh formula whatever the function says
    return "gelu" if approximate == "tanh" or config.bias_activation_fusion else "gelu_erf"
