"""Structured parallel linears: Megatron's ColumnParallelLinear and RowParallelLinear with factors in place of
the matrix.

They take the constructor arguments of Megatron's linears and return ``(output, bias)``, so
``MLPSubmodules(linear_fc1=..., linear_fc2=...)`` takes them. What a rank computes and what travels is in
split_linear.py; here are the parameters, cut by the split table, and the state of the guide.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor, nn

from sffn_dist.parallel import sharded_state
from sffn_dist.parallel.collectives import Exchange, Tokens
from sffn_dist.parallel.functions import ColumnFunction, RowFunction, autocast
from sffn_dist.parallel.linear_init import check_sizes, check_structure, draw_replicated
from sffn_dist.parallel.split import shard
from sffn_dist.parallel.split_linear import ColumnSplit, RowSplit, SplitLinear
from sffn_dist.spec.split_table import linear_tensors, wide_factor
from sffn_dist.structured.cut import Layout, Role, TensorSpec
from sffn_dist.structured.structure import Structure


class StructuredLinear(nn.Module, abc.ABC):
    """What the column- and the row-parallel linear share: parameters by the split table, the guide's state.

    ``guide_weight`` is alpha while this linear computes its guide, None while it does not; the run sets it
    once a step.
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
        self.sequence_parallel = bool(config.sequence_parallel) and self.ranks > 1 and not is_expert
        self.halves = 2 if gated else 1
        self.is_expert = is_expert
        check_structure(structure)
        check_sizes(structure, self.role, input_size, output_size // self.halves, self.ranks)
        self._guide_weight: float | None = None
        self.specs = linear_tensors(
            structure, self.role, input_size, output_size, gated=gated, bias=bias, guide=guide
        )
        for name, spec in self.specs.items():
            self.register_parameter(name, self._parameter(name, spec))
        for name in ("guide", "bias"):
            if name not in self.specs:
                self.register_parameter(name, None)
        self.register_load_state_dict_pre_hook(sharded_state.restore_names)
        self.split = self._split(self._tokens(by_caller=is_expert))

    def _parameter(self, name: str, spec: TensorSpec) -> nn.Parameter:
        on_host = self.config.use_cpu_initialization
        device = "cpu" if on_host else torch.cuda.current_device()
        parameter = nn.Parameter(
            torch.zeros(spec.local_shape(self.ranks), dtype=self.config.params_dtype, device=device)
        )
        # read by gradient norms (a replicated parameter counts once) and by whoever sums what is
        # sequence_parallel: the bias alone, which is added to the rank's own tokens; a factor's gradient
        # leaves backward complete
        marks: dict[str, Any] = {
            "tensor_model_parallel": spec.cut is not None,
            "partition_dim": spec.partition_dim(self.ranks),
            "partition_stride": 1,
            "sequence_parallel": name == "bias" and spec.cut is None and self.sequence_parallel,
            # Megatron reduces an expert's gradients over the experts' data-parallel group
            "allreduce": not (self.is_expert and self.config.expert_model_parallel_size > 1),
        }
        for mark, value in marks.items():
            setattr(parameter, mark, value)
        return parameter

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, std: float | None = None) -> None:
        """The paper's initialisation, one full draw cut for every tensor-parallel rank.

        ``std`` is config.init_method_std, or 0.02.
        """
        std = getattr(self.config, "init_method_std", 0.02) if std is None else std
        sizes = self.input_size, self.output_size
        full = draw_replicated(
            self.structure, self.specs, sizes, std, generator, self.group, expert=self.is_expert
        )
        for name, tensor in full.items():
            getattr(self, name).copy_(shard(tensor, self.specs[name], self.ranks, self.rank))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: sharded_state.Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For megatron-core's ``dist_checkpointing``: see :mod:`sffn_dist.parallel.sharded_state`."""
        return sharded_state.linear_sharded_state_dict(self, prefix, sharded_offsets, metadata)

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.specs if name not in ("guide", "bias")}

    @property
    def weights(self) -> list[Tensor]:
        """[first factor, second factor], and the guide if there is one."""
        factors = [*self.factors.values()]
        return factors if self.guide is None else [*factors, self.guide]

    @abc.abstractmethod
    def _split(self, tokens: Tokens) -> SplitLinear:
        """How the linear is computed on its group's ranks."""

    @property
    def guide_weight(self) -> float | None:
        """Alpha of the coming forward passes; None: the guide is not computed."""
        return self._guide_weight

    @guide_weight.setter
    def guide_weight(self, alpha: float | None) -> None:
        """Raises ValueError where there is no guide."""
        if alpha is not None and self.guide is None:
            raise ValueError(f"guide_weight = {alpha}: this linear was built without a guide")
        self._guide_weight = alpha

    @property
    def explicit_expert_comm(self) -> bool:
        """Megatron's word for it: tokens are brought and results are summed by the caller, the dispatcher
        of experts.
        """
        return self.split.exchange.tokens == "caller"

    @explicit_expert_comm.setter
    def explicit_expert_comm(self, value: bool) -> None:
        # a shared expert that overlaps its own exchange sets it after building
        self.split = self._split(self._tokens(by_caller=value))

    def defer_gradient_sums(self) -> list[nn.Parameter]:
        """From now on backward leaves the gradients of factors that every rank holds as its own tokens made
        them; returns these factors, which the caller sums over the group.
        """
        if self.split.exchange.tokens != "tokens":
            return []
        self.split = replace(self.split, sums_gradients=False)
        return [getattr(self, name) for name in self.factors if self.specs[name].cut is None]

    def _tokens(self, *, by_caller: bool) -> Tokens:
        """Which tokens a rank has.

        Sequence parallelism and experts exclude each other unless the caller says so later.
        """
        if by_caller:
            return "caller"
        return "tokens" if self.sequence_parallel else "replicated"

    def _finish(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None

    @property
    def layout(self) -> Layout:
        """How the inner features lie over ranks: what a first linear writes, a second one must have been
        built to read.
        """
        inner = self.input_size if self.role == "row" else self.output_size // self.halves
        return self.structure.layout(inner)

    def backward_dw(self) -> None:
        """Part of Megatron's linear interface; weight gradients are never delayed here."""

    def extra_repr(self) -> str:
        structure = f"{self.structure.kind}, rank={self.structure.rank}, blocks={self.structure.blocks}"
        return (
            f"{self.input_size} -> {self.output_size}, {structure}, guide={self.guide is not None}, "
            f"ranks={self.ranks}"
        )


class StructuredColumnParallelLinear(StructuredLinear):
    """The first linear of a feed-forward layer: outputs are cut over the tensor-parallel ranks.

    ``init_method`` and ``tp_comm_buffer_name`` are Megatron's, and make no difference here.

    ``stride`` 2 says that the outputs are the two halves of a gated pair, each cut by itself (Megatron's
    convention).
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

    def _split(self, tokens: Tokens) -> ColumnSplit:
        return ColumnSplit(
            self.structure, Exchange(self.group, tokens, wide_factor(self.specs).block_groups(self.ranks))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (S or S/p, batch, h) -> (S, batch, f/p), and the bias if it is left to the caller."""
        x, weights, off = autocast(x, self.weights)
        with off:
            y = ColumnFunction.apply(self.split, self.guide_weight, x, *weights)
        return self._finish(y)


class StructuredRowParallelLinear(StructuredLinear):
    """The second linear of a feed-forward layer: inputs are cut over the tensor-parallel ranks, as the
    first one left them.
    """

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
            raise ValueError(
                "input_is_parallel = False: a structured row-parallel linear takes features "
                "that are cut already"
            )
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

    def _split(self, tokens: Tokens) -> RowSplit:
        first_factor = wide_factor(self.specs)
        needs_exchange = first_factor.cut is not None and first_factor.cut.exchanges_features(self.ranks)
        return RowSplit(
            self.structure,
            Exchange(self.group, tokens, first_factor.block_groups(self.ranks)),
            needs_exchange=needs_exchange,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (S, batch, f/p) -> (S or S/p, batch, h), and the bias if it is left to the caller."""
        x, weights, off = autocast(x, self.weights)
        with off:
            y = RowFunction.apply(self.split, self.guide_weight, x, *weights)
        return self._finish(y)
