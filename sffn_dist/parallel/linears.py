"""Structured parallel linears: Megatron's ColumnParallelLinear and RowParallelLinear with factors in place of the matrix.

They take the constructor arguments of Megatron's linears and return ``(output, bias)``, so ``MLPSubmodules(linear_fc1=...,
linear_fc2=...)`` takes them. Only the bottleneck z is exchanged (S tokens, p ranks, SP = sequence parallelism):

    column (h -> f)   z = first(x) on the rank's tokens (SP) or on all (no SP), by a replicated factor;
                      SP: all-gather z over tokens; no SP: identity, all-reduce in backward; then the rank's part of the second factor
    row (f -> h)      z = the rank's part of the first factor on its features, a partial sum;
                      SP: reduce-scatter z over tokens; no SP: all-reduce; then second(z) by a replicated factor

With the guide on (``guide_weight`` = alpha): y = alpha W x + (1 - alpha) second(first(x)), bias added after (paper, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor, nn

from sffn_dist.parallel import collectives, sharded_state
from sffn_dist.parallel.split import shard
from sffn_dist.parallel.standalone import check_sizes, check_structure, draw_alike
from sffn_dist.shapes import Layout, Role, Structure, TensorSpec, inner_layout, linear_tensors
from sffn_dist.structured import maps


class StructuredLinear(nn.Module):
    """What the column- and the row-parallel linear share: parameters by the split table, the guide's state.

    ``guide_weight`` is alpha while this linear computes its guide, None while it does not; the run sets it once a step.
    """

    role: Role
    guide: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        structure: Structure,
        config: ModelParallelConfig,
        gated: bool,
        guide: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_group: torch.distributed.ProcessGroup | None,
    ):
        super().__init__()
        self.structure, self.config = structure, config
        self.input_size, self.output_size = input_size, output_size
        self.skip_bias_add = skip_bias_add
        self.group = get_tensor_model_parallel_group_if_none(tp_group, is_expert=is_expert)
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self.sequence_parallel = bool(config.sequence_parallel) and self.ranks > 1
        self.halves = 2 if gated else 1
        self.is_expert = is_expert
        check_structure(structure)
        check_sizes(structure, input_size, output_size // self.halves)
        self.guide_weight: float | None = None
        self.specs = linear_tensors(structure, self.role, input_size, output_size, gated=gated, bias=bias, guide=guide)
        for name, spec in self.specs.items():
            self.register_parameter(name, self._parameter(name, spec))
        for name in ("guide", "bias"):
            if name not in self.specs:
                self.register_parameter(name, None)
        self.register_load_state_dict_pre_hook(sharded_state.restore_names)

    def _parameter(self, name: str, spec: TensorSpec) -> nn.Parameter:
        on_host = self.config.use_cpu_initialization
        device = "cpu" if on_host else torch.cuda.current_device()
        parameter = nn.Parameter(torch.zeros(spec.local_shape(self.ranks), dtype=self.config.params_dtype, device=device))
        # read by gradient norms (a replicated parameter counts once) and by sum_partial_gradients
        marks: dict[str, Any] = {
            "tensor_model_parallel": spec.cut is not None,
            "partition_dim": spec.partition_dim(self.ranks),
            "partition_stride": 1,
            "sequence_parallel": spec.cut is None and self.sequence_parallel,
            # Megatron reduces an expert's gradients over the experts' data-parallel group
            "allreduce": not (self.is_expert and self.config.expert_model_parallel_size > 1),
        }
        for mark, value in marks.items():
            setattr(parameter, mark, value)
        return parameter

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, std: float | None = None) -> None:
        """The paper's initialisation, one full draw cut for every tensor-parallel rank; ``std`` is config.init_method_std, or 0.02."""
        std = getattr(self.config, "init_method_std", 0.02) if std is None else std
        sizes = self.input_size, self.output_size
        full = draw_alike(self.structure, self.specs, sizes, std, generator, self.group, expert=self.is_expert)
        for name, tensor in full.items():
            getattr(self, name).copy_(shard(tensor, self.specs[name], self.ranks, self.rank))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: sharded_state.Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For megatron-core's ``dist_checkpointing``: see :mod:`sffn_dist.parallel.sharded_state`."""
        return sharded_state.linear_sharded_state_dict(self, prefix, sharded_offsets, metadata)

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.specs if name not in ("guide", "bias")}

    def _keep_guide_gradient(self, z: Tensor) -> Tensor:
        """An undrawn guide's gradient is zero, not absent: else ZeRO-3 would apply the last step's again. z is the narrow place."""
        if self.guide is not None and self.guide_weight is None and torch.is_grad_enabled():
            return z + self.guide[:0].sum().to(z.dtype)
        return z

    def _finish(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None

    @property
    def layout(self) -> Layout:
        """How the inner features lie over ranks: what a first linear writes, a second one must have been built to read."""
        inner = self.input_size if self.role == "row" else self.output_size // self.halves
        return inner_layout(self.structure.kind, inner, self.structure.blocks)

    def backward_dw(self) -> None:
        """Part of Megatron's linear interface; weight gradients are never delayed here."""

    def extra_repr(self) -> str:
        structure = f"{self.structure.kind}, rank={self.structure.rank}, blocks={self.structure.blocks}"
        return f"{self.input_size} -> {self.output_size}, {structure}, guide={self.guide is not None}, ranks={self.ranks}"


class StructuredColumnParallelLinear(StructuredLinear):
    """The first linear of a feed-forward layer: outputs are cut over the tensor-parallel ranks.

    ``stride`` 2 says that the outputs are the two halves of a gated pair, each cut by itself (Megatron's convention).
    """

    role = "column"

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        structure: Structure,
        config: ModelParallelConfig,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        skip_bias_add: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
        guide: bool = False,
    ):
        if gather_output:
            raise ValueError("gather_output = True: a structured column-parallel linear keeps its output cut")
        if stride not in (1, 2):
            raise ValueError(f"stride = {stride}: must be 1, or 2 for a gated pair")
        super().__init__(
            input_size,
            output_size,
            structure=structure,
            config=config,
            gated=stride == 2,
            guide=guide,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_group=tp_group,
        )
        if config.perform_initialization:
            self.reset_parameters()

    def _exchange(self, z: Tensor) -> Tensor:
        move = collectives.gather_tokens if self.sequence_parallel else collectives.copy
        return move(z, self.group)

    def _first_block(self) -> int:
        """The first of block_shuffle's output blocks that this rank holds."""
        cut = self.specs["block_out"].cut
        assert cut is not None
        return next((start for axis, start, _ in cut.starts(self.ranks, self.rank) if axis == 0), 0) if cut.axes else 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (S or S/p, batch, h) -> (S, batch, f/p), and the bias if it is left to the caller."""
        factors = self.factors
        z = self._exchange(self._keep_guide_gradient(maps.first(self.structure, x, factors)))
        first_block = self._first_block() if self.structure.kind == "block_shuffle" else 0
        y = maps.second(self.structure, z, factors, first_block)
        if self.guide_weight is None:
            return self._finish(y)
        assert self.guide is not None, "guide_weight is set on a linear without a guide"
        return self._finish(torch.lerp(y, F.linear(self._exchange(x), self.guide), self.guide_weight))


class StructuredRowParallelLinear(StructuredLinear):
    """The second linear of a feed-forward layer: inputs are cut over the tensor-parallel ranks, as the first one left them."""

    role = "row"

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        structure: Structure,
        config: ModelParallelConfig,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        stride: int = 1,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
        guide: bool = False,
    ):
        if not input_is_parallel:
            raise ValueError("input_is_parallel = False: a structured row-parallel linear takes features that are cut already")
        super().__init__(
            input_size,
            output_size,
            structure=structure,
            config=config,
            gated=False,
            guide=guide,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_group=tp_group,
        )
        if config.perform_initialization:
            self.reset_parameters()

    def _exchange(self, z: Tensor) -> Tensor:
        move = collectives.scatter_tokens if self.sequence_parallel else collectives.reduce
        return move(z, self.group)

    def _place_blocks(self, z: Tensor) -> Tensor:
        """z of the rank's input blocks -> z of all of them, zero elsewhere."""
        block_in = self.specs["block_in"]
        assert block_in.cut is not None
        blocks, outputs, _ = block_in.shape
        held = block_in.local_shape(self.ranks)[0]
        if held == blocks:
            return z
        start = next(start for axis, start, _ in block_in.cut.starts(self.ranks, self.rank) if axis == 0)
        return F.pad(z, (start * outputs, (blocks - start - held) * outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (S, batch, f/p) -> (S or S/p, batch, h), and the bias if it is left to the caller."""
        factors = self.factors
        z = self._keep_guide_gradient(maps.first(self.structure, x, factors))
        if self.structure.kind != "low_rank":
            z = self._place_blocks(z)
        y = maps.second(self.structure, self._exchange(z), factors)
        if self.guide_weight is None:
            return self._finish(y)
        assert self.guide is not None, "guide_weight is set on a linear without a guide"
        return self._finish(torch.lerp(y, self._exchange(F.linear(x, self.guide)), self.guide_weight))
