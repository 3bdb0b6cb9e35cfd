"""Structured feed-forward layers for somebody else's megatron-core model.

A model is handed a spec, and everything else stays as it is: the config, the process groups, the data, the
training loop::

    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from sffn_dist.parallel import cpu_compat
    from sffn_dist.parallel.layer_spec import NormLayer, structured_layer_spec

    # before anything of megatron-core is built: needed without CUDA, harmless with it
    cpu_compat.prepare()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    spec = structured_layer_spec("block_shuffle", blocks=4)
    layers = TransformerBlockSubmodules([spec] * config.num_layers, layer_norm=NormLayer)
    model = GPTModel(config, layers, vocab, length)

What else there is to know:

* The final norm is not in a layer's spec. ``GPTModel(config, spec, ...)`` takes megatron-core's own; without
  apex or Transformer Engine that one refuses ``sequence_parallel``, hence ``layer_norm=NormLayer`` above.
* Without CUDA: ``use_cpu_initialization=True`` (else megatron-core's own dense linears start with equal
  shards on all tensor-parallel ranks), the fusions of the config off, ``gradient_accumulation_fusion=False``,
  and the causal mask handed to the model: megatron-core makes its default one on a GPU.
* Gradients of the factors leave backward complete. Those of norms and of the second linear's bias, which
  sequence-parallel ranks have in part, carry Megatron's mark ``sequence_parallel``; its
  ``finalize_model_grads`` sums them. A loop that does without it calls
  ``collectives.sum_partial_gradients(model, group)`` once before training.
* Experts: no collective of the linears' own in forward, as with megatron-core's; the token dispatcher moves
  the tokens. Over an expert-tensor-parallel group the factors that every rank holds have their gradients
  summed in backward.
* Checkpoints: ``model.sharded_state_dict()`` with megatron-core's ``dist_checkpointing``; they load on any
  tensor-parallel size. Layers of different structures need ``metadata={"non_homogeneous_layers": True}``, as
  with megatron-core's own.
* First weights are the paper's, of standard deviation ``config.init_method_std``; ``init_method`` and
  ``output_layer_init_method`` make no difference to them.
* The guide starts switched off. A linear adds it, with weight alpha, while its ``guide_weight`` is alpha and
  not None.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from sffn_dist.parallel.feed_forward import Recompute, StructuredMLP
from sffn_dist.parallel.layers import NormLayer
from sffn_dist.parallel.linear_init import check_structure
from sffn_dist.parallel.linears import StructuredColumnParallelLinear, StructuredRowParallelLinear
from sffn_dist.structured.registry import build_structure

__all__ = ["NormLayer", "structured_layer_spec", "structured_mlp_submodules"]


def structured_mlp_submodules(
    kind: str, *, rank: int | None = None, blocks: int | None = None, guide: bool = False
) -> MLPSubmodules:
    """Two structured linears for a module that takes ``MLPSubmodules``: ``MLP``, the experts of a
    ``MoELayer``.

    ``kind`` "low_rank" needs ``rank``, "block_dense" ``rank`` and ``blocks``, "block_shuffle" ``blocks``;
    another registered kind what its ``settings`` name (structured/registry.py). ``guide`` adds the dense
    matrix of self-guided training to each. Experts::

        experts = ModuleSpec(module=SequentialMLP, submodules=structured_mlp_submodules("low_rank", rank=256))
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))

    (grouped experts hold all their matrices in one tensor and take no linears).

    Raises ValueError for an unknown kind, a missing, superfluous or unfit rank or blocks; the linears
    themselves raise it, when they are built, for sizes that the model's widths or its tensor-parallel size do
    not fit.
    """
    structure = build_structure(kind, rank, blocks)
    check_structure(structure)
    params: dict[str, Any] = {"structure": structure, "guide": guide}
    return MLPSubmodules(
        linear_fc1=ModuleSpec(module=StructuredColumnParallelLinear, params=dict(params)),
        linear_fc2=ModuleSpec(module=StructuredRowParallelLinear, params=dict(params)),
    )


def structured_layer_spec(
    kind: str,
    *,
    rank: int | None = None,
    blocks: int | None = None,
    guide: bool = False,
    recompute: Recompute = "none",
    tp_group: dist.ProcessGroup | None = None,
    base: ModuleSpec | None = None,
) -> ModuleSpec:
    """A transformer layer whose feed-forward layer is structured: y = W2 act(W1 x), W1 (f or 2f, h) and W2
    (h, f) of the given kind.

    ``base`` is the layer's spec, by default megatron-core's ``get_gpt_layer_local_spec()`` with norms that
    run on any device and under sequence parallelism; it is copied, never changed, and everything but its
    feed-forward linears is kept. Where it has no norm before the feed-forward layer because Transformer
    Engine fuses that into the first linear, the copy gets one. With ``recompute`` "bottleneck" backward keeps
    the two bottlenecks and rebuilds the f-wide activations (parallel/feed_forward.py). On several ranks
    kernels are chosen by measuring only once these agree how (kernel_choice.start); before, a table decides,
    or plain torch. ``tp_group`` is then needed by models built over groups that are not ``parallel_state``'s:
    megatron-core hands a layer's group to its own MLP alone (and says "Unknown MLP type" of any other, which
    is all that it means).

    Raises ValueError as :func:`structured_mlp_submodules` does, and for a base whose ``mlp`` is not
    megatron-core's MLP.
    """
    linears = structured_mlp_submodules(kind, rank=rank, blocks=blocks, guide=guide)
    spec = copy.deepcopy(base) if base is not None else get_gpt_layer_local_spec()
    layer = spec.submodules
    if base is None:
        layer.input_layernorm = layer.pre_mlp_layernorm = NormLayer
    mlp: Any = getattr(layer, "mlp", None)
    held = getattr(mlp, "submodules", None)
    if not isinstance(held, MLPSubmodules):
        raise ValueError(
            f"base: its mlp is {getattr(mlp, 'module', mlp)}, not built of two linears (MLPSubmodules); "
            "for experts put structured_mlp_submodules() into their own spec"
        )
    if layer.pre_mlp_layernorm is IdentityOp:
        layer.pre_mlp_layernorm = NormLayer
    submodules = replace(held, linear_fc1=linears.linear_fc1, linear_fc2=linears.linear_fc2)
    if mlp.module is not MLP:
        raise ValueError(
            f"base: its mlp is a {mlp.module.__name__}, which would be lost; it must be megatron-core's MLP"
        )
    layer.mlp = replace(mlp, submodules=submodules)
    if recompute != "none":
        params = {
            **mlp.params,
            "recompute": recompute,
            **({"tp_group": tp_group} if tp_group is not None else {}),
        }
        layer.mlp = replace(layer.mlp, module=StructuredMLP, params=params)
    return spec
