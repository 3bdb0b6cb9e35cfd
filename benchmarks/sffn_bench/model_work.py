"""Launches of a model's micro-step and of its update on one rank, in bf16 and without guides.

Standard library only.

Sizes: T tokens of the micro-batch, T' a rank's own (T/p with sequence parallelism), S tokens of a sequence, h
width, a and k the rank's widths of queries and keys, V its rows of the table, n its parameters. What is read
and written, in elements of bf16 unless said:

    embedding         T h read and written, laid out anew; backward the gradient likewise, the table's zeroed
                      and written 2 V h, tied summed with the output layer's 3 V h
    norms             2 T' h; backward 3 T' h for the input's gradient, 2 T' h for the weights'
    attention linears as device_work.product; the bias of linear_qkv added in a pass 2 T (a + 2k), its
                      gradient T (a + 2k)
    rotary embedding  six operations 12 T (a + k); backward seven 14 T (a + k), their gradients joined with
                      those of v 2 T (a + 2k)
    attention core    flash: T (2a + 2k); backward T (6a + 4k) and dq in fp32, 18 bytes an element. FLOPs of a
                      causal triangle: forward 2 T S a, backward 5 T S a with the scores computed again
    residual adds     twice a layer: bias 2 T' h, sum 3 T' h; backward bias T' h, sum of both gradients 3 T' h
    loss              fp32 logits: 38 bytes a logit forward (copy, maximum, difference, exponential, sum,
                      quotient), 14 backward (product, copy to bf16)
    accumulation      the gradient to fp32 and added to its sum: 18 n bytes
    update            norm 4 n bytes, AdamW 28 n, bf16 copy 6 n, sums zeroed 4 n; no gradient is clipped

Launches are those that tests/gpu_room/fake_cuda counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from sffn_bench.device_work import DeviceRates, Work, again, passes, product, small, within
from sffn_bench.feed_forward_work import FeedForwardWork
from sffn_dist.spec import traffic
from sffn_dist.spec.config import Config
from sffn_dist.spec.counts import parameters_per_rank
from sffn_dist.spec.feed_forward_activations import FeedForward
from sffn_dist.spec.layer_activations import MicroBatch
from sffn_dist.spec.split_table import ffn_structure, model_tensors

NORMS, LINEARS, ROTARY, CORE = "norms", "attention linears", "rotary embedding", "attention core"
RESIDUAL, EMBEDDING, OUTPUT, LOSS = "residual adds", "embedding", "output layer", "loss"
ACCUMULATION, COLLECTIVES = "gradient accumulation", "collectives"
NORM, ADAMW, WEIGHTS, CHECKS = "gradient norm", "AdamW", "weights to bf16, sums to 0", "checks, step count"
# torch's fused AdamW: blocks of a launch x elements of a block (ATen/native/cuda/MultiTensorApply.cuh)
ELEMENTS_OF_LAUNCH = 320 * 65536


class ModelWork:
    """The launches of a config on a device."""

    def __init__(self, config: Config, device: DeviceRates):
        self.config, self.device = config, device
        self.part = MicroBatch(config, 2, False, cuda=True)
        p, h = config.parallel.tensor, config.model.width
        self.tokens, self.own = self.part.tokens, self.part.own_tokens
        self.stream, self.whole = self.own * h, self.tokens * h
        self.queries = config.attention_dim // p
        self.keys = max(config.kv_heads // p, 1) * config.head_dim
        self.qkv = (config.attention_dim + 2 * config.kv_heads * config.head_dim) // p
        self.grouped = config.kv_heads < config.model.heads
        self.rows = config.model.vocab // p
        self.tensors = list(model_tensors(config, guide=False).values())
        self.parameters = parameters_per_rank(config, guide=False)

    # ------------------------------------------------------------------------------------------------- layers

    def _attention(self) -> Iterator[Work]:
        h, tokens = self.config.model.width, self.tokens
        yield product(LINEARS, tokens, h, self.qkv)
        if self.config.model.bias:
            yield passes(LINEARS, tokens * self.qkv, 2)
        # of both tables cosine or sine, its scale and bf16 copy, of S numbers a feature: for queries and keys
        yield small(ROTARY, 12)
        yield passes(ROTARY, tokens * (self.queries + self.keys), 12, 12)
        core = passes(CORE, tokens * (2 * self.queries + 2 * self.keys), 1)
        yield self._core(core, 2)
        yield product(LINEARS, tokens, self.queries, h)

    def _core(self, moved: Work, products: int) -> Work:
        """So many products over the causal half of the scores, 2 T S a / 2 each."""
        flops = products * self.tokens * self.config.model.sequence * self.queries
        return Work(CORE, moved.launches, moved.bytes, flops, "attention", flops // 5 if products == 5 else 0)

    def _attention_backward(self) -> Iterator[Work]:
        h, tokens = self.config.model.width, self.tokens
        yield product(LINEARS, tokens, self.queries, h).times(2)
        moved = passes(CORE, tokens * (6 * self.queries + 4 * self.keys), 1, 3)
        in_fp32 = 18 * tokens * self.queries
        yield self._core(Work(CORE, moved.launches, moved.bytes + in_fp32), 5)
        if self.grouped:  # flash's gradients of keys and values are of every query head, and then summed
            yield passes(CORE, 2 * tokens * self.queries, 2, 2)
        yield passes(ROTARY, tokens * (self.queries + self.keys), 14, 14)
        yield passes(ROTARY, tokens * self.qkv, 2)
        if self.config.model.bias:
            yield passes(LINEARS, tokens * self.qkv, 1)
        yield product(LINEARS, tokens, h, self.qkv).times(2)

    def _added(self) -> Iterator[Work]:
        if self.config.model.bias:
            yield passes(RESIDUAL, self.stream, 2)
        yield passes(RESIDUAL, self.stream, 3)

    def _added_backward(self) -> Iterator[Work]:
        if self.config.model.bias:
            yield passes(RESIDUAL, self.stream, 1)
        yield passes(RESIDUAL, self.stream, 3)

    def _norm(self) -> Work:
        return passes(NORMS, self.stream, 2)

    def _norm_backward(self) -> Work:
        return passes(NORMS, self.stream, 5, 2)

    def _layer(self, index: int) -> Iterator[Work]:
        """Forward and backward pass of a layer."""
        feed_forward = FeedForwardWork(FeedForward(self.part, ffn_structure(self.config, index)), self.device)
        attention = [self._norm(), *self._attention(), *self._added()]
        forward = [*attention, self._norm(), *feed_forward.forward()]
        yield from within("forward", [*forward, *self._added()])
        if self.config.recompute == "full":  # all but the last sum, which nothing reads
            yield from within("recomputed", again(forward))
        yield from within("backward", self._added_backward())
        yield from within("backward", feed_forward.backward())
        yield from within("backward", [self._norm_backward(), *self._added_backward()])
        yield from within("backward", [*self._attention_backward(), self._norm_backward()])

    # --------------------------------------------------------------------------------------------------- ends

    def _embedding(self) -> Iterator[Work]:
        yield small(EMBEDDING, 2)  # tokens, read from the micro-batch
        yield passes(EMBEDDING, self.whole, 4, 2)
        if self.part.ranks > 1:  # rows of other ranks: masked tokens, and a mask over the output
            yield small(EMBEDDING, 6)
            yield passes(EMBEDDING, self.whole, 1)
        if self.part.split_by_tokens:
            yield passes(EMBEDDING, self.whole, 2)

    def _embedding_backward(self) -> Iterator[Work]:
        table = self.rows * self.config.model.width
        if self.part.ranks > 1:
            yield passes(EMBEDDING, self.whole, 2)
        yield passes(EMBEDDING, self.whole, 3, 6)
        yield passes(EMBEDDING, table, 2)
        if self.config.model.tie_embeddings:
            yield passes(EMBEDDING, table, 3)

    def _loss(self) -> Iterator[Work]:
        logits = self.tokens * self.rows
        yield Work(LOSS, 6, 38 * logits)
        yield small(LOSS, 16)  # of the labels, their logits, the mean

    def _loss_backward(self) -> Iterator[Work]:
        logits = self.tokens * self.rows
        yield Work(LOSS, 2, 14 * logits)
        yield small(LOSS, 16)

    # --------------------------------------------------------------------------------------------- micro-step

    def micro_step(self) -> Iterator[Work]:
        """One micro-step with all that it sends."""
        output = product(OUTPUT, self.tokens, self.config.model.width, self.rows)
        yield from within("forward", self._embedding())
        for index in range(self.config.model.layers):
            yield from self._layer(index)
        yield from within("forward", [self._norm(), output, *self._loss()])
        yield from within("backward", [*self._loss_backward(), output.times(2), self._norm_backward()])
        yield from within("backward", self._embedding_backward())
        yield Work(ACCUMULATION, 2 * len(self.tensors), 18 * self.parameters)
        for transfer in traffic.model_traffic(self.config):
            if transfer.purpose in ("forward", "backward"):
                yield self._received(transfer)

    def _received(self, transfer: traffic.Transfer) -> Work:
        """One collective of the tensor-parallel group."""
        received = math.ceil(transfer.elements * (transfer.size or self.part.element))
        return Work(f"{transfer.purpose} {COLLECTIVES}", 1, received, unit="link")

    def update(self) -> Iterator[Work]:
        """What comes once a step, after its micro-steps."""
        gradients = [
            self._received(transfer)
            for transfer in traffic.step_traffic(self.config, 1)
            if transfer.purpose == "gradient"
        ]
        if gradients:  # one flat sum of all of them
            yield replace(gradients[0], bytes=sum(work.bytes for work in gradients))
            yield small(gradients[0].part, 2)  # into one tensor, and back
        n = self.parameters
        yield Work(NORM, len(self.tensors), 4 * n)
        yield Work(ADAMW, math.ceil(n / ELEMENTS_OF_LAUNCH), 28 * n)
        yield Work(WEIGHTS, 3, 10 * n)
        yield small(CHECKS, 25)
