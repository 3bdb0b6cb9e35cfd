"""What norms, attention and the two ends of the model hold of a micro-batch on one rank.

activations.py has the sizes by name and puts them together. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from sffn_dist.spec.config import Config


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on one tensor-parallel rank; what no feed-forward layer has a part in. All in bytes."""

    config: Config
    element: int
    guide: bool
    cuda: bool

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks, p."""
        return self.config.parallel.tensor

    @property
    def split_by_tokens(self) -> bool:
        """Whether sequence parallelism splits the stream."""
        return self.config.parallel.sequence and self.ranks > 1

    @property
    def tokens(self) -> int:
        """Of the micro-batch, T."""
        return self.config.micro_batch_size * self.config.model.sequence

    @property
    def own_tokens(self) -> int:
        """Of which this rank has the stream, T'."""
        return self.tokens // (self.ranks if self.split_by_tokens else 1)

    def of_tokens(self, features: int) -> int:
        """So many features of all tokens."""
        return self.tokens * features * self.element

    @property
    def stream(self) -> int:
        """The residual stream, or its gradient: T' h."""
        return self.own_tokens * self.config.model.width * self.element

    @property
    def whole_stream(self) -> int:
        """Of all tokens: T h."""
        return self.of_tokens(self.config.model.width)

    @property
    def gathered(self) -> int:
        """The buffer in which Megatron's linears gather the stream; it stays from the first layer on."""
        return self.whole_stream if self.split_by_tokens else 0

    # ---------------------------------------------------------------------------------------- norm, attention

    @property
    def _norm_in_steps(self) -> bool:
        """Whether torch has no operator for it, but several in fp32."""
        return self.config.model.norm == "rmsnorm" and not self.cuda

    @property
    def norm_kept(self) -> int:
        """What one norm keeps for backward."""
        in_fp32 = 4 * self.own_tokens * self.config.model.width
        steps = 0
        if self._norm_in_steps:  # in bf16 the input's copy in fp32 takes the place of the stream itself
            steps = 2 * in_fp32 - self.stream if self.element == 2 else in_fp32
        return self.stream + steps + 8 * self.own_tokens

    @property
    def input_beside_norm(self) -> int:
        """A layer's input, where ``recompute: full`` keeps it and the first norm its copy in fp32."""
        return self.stream if self._norm_in_steps and self.element == 2 else 0

    @property
    def norm_backward(self) -> int:
        """The gradient of its input; in steps, five tensors in fp32 of which that is made."""
        in_fp32 = 4 * self.own_tokens * self.config.model.width
        return 5 * in_fp32 if self._norm_in_steps else self.stream

    @property
    def _attention(self) -> int:
        return self.config.attention_dim // self.ranks

    @property
    def _keys(self) -> int:
        """Width of a rank's keys: where key/value heads are fewer than ranks, of one head."""
        return max(self.config.kv_heads // self.ranks, 1) * self.config.head_dim

    @property
    def _repeated(self) -> bool:
        """Whether queries of several heads read copies of one key/value head; flash attention, which CUDA has
        for bf16, needs none.
        """
        return self.config.kv_heads < self.config.model.heads and not (self.cuda and self.element == 2)

    @property
    def attention_kept(self) -> int:
        """What attention keeps for backward beside its input."""
        config = self.config
        qkv = config.attention_dim + 2 * config.kv_heads * config.head_dim
        if self._repeated:  # linear_qkv's own output is read by nobody then
            features = 4 * self._attention
        else:
            features = (qkv if config.gathers_qkv else qkv // self.ranks) + 2 * self._attention + self._keys
        return self.of_tokens(features) + 4 * self.tokens * config.model.heads // self.ranks

    @property
    def attention_backward(self) -> int:
        """The first norm and the attention, the stream's gradient, and either the gradients of output,
        queries, keys and values, or the stream's of all tokens with that of the output.
        """
        grouped = self.config.kv_heads < self.config.model.heads  # flash's are of every query head too
        of_keys = 2 * (self._attention if grouped else self._keys)
        within = self.of_tokens(2 * self._attention + of_keys)
        around = self.gathered + self.of_tokens(self._attention)
        return self.norm_kept + self.attention_kept + self.stream + max(within, around)

    @property
    def attention_forward(self) -> int:
        """At its output: what it keeps, linear_qkv's output and the keys where they are not kept, and the
        output of all tokens, then of the rank's own.
        """
        config = self.config
        qkv = config.attention_dim + 2 * config.kv_heads * config.head_dim
        rows = qkv if config.gathers_qkv else qkv // self.ranks
        unkept = self.of_tokens(rows + self._keys) if self._repeated else 0
        scattered = self.stream if self.split_by_tokens else 0
        return self.norm_kept + self.attention_kept + unkept + self.whole_stream + scattered

    # ------------------------------------------------------------------------------------------- the two ends

    @property
    def _table(self) -> int:
        """This rank's part of the embedding, or of the output layer."""
        return self.config.model.vocab // self.ranks * self.config.model.width * self.element

    @property
    def logits(self) -> int:
        """In fp32 those of a padded vocabulary stand beside those that are masked."""
        size = 2 + 4
        if self.element == 4:
            size = 8 if self.config.vocab_unpadded < self.config.model.vocab else 4
        return size * self.tokens * self.config.model.vocab // self.ranks

    @property
    def output_layer_backward(self) -> int:
        """The gradients of the logits, of the hidden state, and of the output layer's weights."""
        logits = self.of_tokens(self.config.model.vocab // self.ranks)
        reduced = self.stream if self.split_by_tokens else 0
        return logits + self.whole_stream + reduced + self._table

    @property
    def table_waits(self) -> int:
        """The tied table's gradient by the output layer, until the embedding's is there."""
        return self._table if self.config.model.tie_embeddings else 0

    @property
    def embedding_backward(self) -> int:
        """The gradients of the embedding's output, laid out twice, and of the table."""
        return 2 * self.whole_stream + (3 if self.config.model.tie_embeddings else 1) * self._table
